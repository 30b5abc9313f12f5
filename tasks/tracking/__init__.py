"""MLflow: what a run looks like there, derived from journal and records. Imports no torch and, until something is sent, no MLflow."""

from tasks.tracking.connection import full_address, tracking_uri
from tasks.tracking.registry import ModelVersion, Registry
from tasks.tracking.runs import OpenRun
from tasks.tracking.tracking import Tracking

__all__ = ["ModelVersion", "OpenRun", "Registry", "Tracking", "full_address", "tracking_uri"]
