"""The loader that models registered by edgepress 0.1 name; today it is `tasks.tracking.serving`."""

from tasks.tracking.serving import _load_pyfunc

__all__ = ["_load_pyfunc"]
