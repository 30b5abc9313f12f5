"""Bounds on the distance of an artifact to its checkpoint, by what its exporter did to the weights. Imports no torch.

Gates judge them from records (tasks/measurement/gates.py), so a changed bound repeats neither the export nor the measurement.
"""

from collections.abc import Mapping
from typing import Literal

# What an exporter did to the weights; it decides how far the artifact may move from its parent.
Change = Literal["float", "int8", "int8-static", "int4", "carried"]

KL_TO_PARENT: Mapping[Change, float] = {
    "float": 1e-4,  # f32, f16, bf16: rounding of a float type
    "int8": 1e-2,  # q8_0, and int8 with ranges found at run time
    "int8-static": 5e-2,  # int8 with ranges from calibration
    "int4": 1.5e-1,  # codes of up to 6 bits that the exporter rounded itself
    "carried": 1e-3,  # codes of a GPTQ or AWQ checkpoint, against that checkpoint
}
