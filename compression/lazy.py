"""Names of a package that are imported on first use, so that planning can import the package without torch."""

import importlib
from collections.abc import Callable
from typing import Any


def lazy_names(package: str, **modules: str) -> Callable[[str], Any]:
    """Return a package's `__getattr__` (PEP 562), which imports each name from its module on first use."""

    def load(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(modules[name]), name)

    return load
