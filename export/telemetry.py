"""Import OpenVINO without its telemetry, which is on by default: it writes an id into the home directory and sends usage data."""

import sys
from types import ModuleType


def import_openvino() -> ModuleType:
    """Import OpenVINO with its telemetry package hidden, so that OpenVINO uses its own stub, which sends nothing.

    Call this before importing a module that imports OpenVINO, such as transformers' exporter. An OpenVINO that is already imported is
    returned as it is.
    """
    if "openvino" not in sys.modules:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment] # Python's own way to make an import fail
    import openvino

    return openvino
