"""Measuring a model through whatever runtime opens it. The package itself imports no torch.

The versions are part of every record's key: raise one when a figure changes its value or meaning.
"""

QUALITY_VERSION = 3
SPEED_VERSION = 4
