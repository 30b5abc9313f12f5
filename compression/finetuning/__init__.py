"""Fine-tuning on next tokens: every weight, or low-rank adapters that are merged afterwards. Importing the package imports no torch."""

from typing import TYPE_CHECKING

from compression.finetuning.settings import FinetuningSettings, check_method
from compression.lazy import lazy_names

if TYPE_CHECKING:
    from compression.finetuning.method import finetune

__all__ = ["FinetuningSettings", "check_method", "finetune"]
__getattr__ = lazy_names(__name__, finetune="compression.finetuning.method")
