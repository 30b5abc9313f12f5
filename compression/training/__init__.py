"""Training: the one loop that every method of training uses, its rows, masks and settings. Importing the package imports no torch."""

from typing import TYPE_CHECKING

from compression.lazy import lazy_names
from compression.training.settings import TrainingSettings

if TYPE_CHECKING:
    from compression.training.batches import TrainingRows
    from compression.training.distributed import in_processes
    from compression.training.loop import train
    from compression.training.masks import FixedMasks, attach_masks, attached_masks
    from compression.training.students import open_student, save_student
    from compression.training.trainer import TrainingRun

__all__ = [
    "FixedMasks",
    "TrainingRows",
    "TrainingRun",
    "TrainingSettings",
    "attach_masks",
    "attached_masks",
    "in_processes",
    "open_student",
    "save_student",
    "train",
]
__getattr__ = lazy_names(
    __name__,
    FixedMasks="compression.training.masks",
    TrainingRows="compression.training.batches",
    TrainingRun="compression.training.trainer",
    attach_masks="compression.training.masks",
    attached_masks="compression.training.masks",
    in_processes="compression.training.distributed",
    open_student="compression.training.students",
    save_student="compression.training.students",
    train="compression.training.loop",
)
