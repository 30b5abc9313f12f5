"""What is measured of a result, and what follows from it: records, gates and verdicts. Imports no torch."""

from typing import TYPE_CHECKING

from compression.lazy import lazy_names

if TYPE_CHECKING:
    from tasks.measurement.gates import Bound, Verdict, judge
    from tasks.measurement.measure import Measured, compare
    from tasks.measurement.measurement import MeasurementRequest, Subject

__all__ = ["Bound", "Measured", "MeasurementRequest", "Subject", "Verdict", "compare", "judge"]
__getattr__ = lazy_names(
    __name__,
    Bound="tasks.measurement.gates",
    Measured="tasks.measurement.measure",
    MeasurementRequest="tasks.measurement.measurement",
    Subject="tasks.measurement.measurement",
    Verdict="tasks.measurement.gates",
    compare="tasks.measurement.measure",
    judge="tasks.measurement.gates",
)
