"""The one training loop, and the students that it trains."""

from compression.training.loop import seeded, train
from compression.training.students import open_student, save_student
from compression.training.validation import HeldOut

__all__ = ["HeldOut", "open_student", "save_student", "seeded", "train"]
