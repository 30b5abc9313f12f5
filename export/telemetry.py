"""OpenVINO without its telemetry, which is on until somebody switches it off: importing it writes an id into the home directory and reports home."""

import sys
from types import ModuleType


def import_openvino() -> ModuleType:
    """Import OpenVINO with its telemetry package out of reach, so that it takes its own stand-in which sends nothing.

    Whoever imports what imports OpenVINO (transformers' exporter does) calls this before. An OpenVINO that the program had imported
    earlier is returned as it is.
    """
    if "openvino" not in sys.modules:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment] # Python's own way to make an import fail
    import openvino

    return openvino
