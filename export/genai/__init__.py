"""Write a checkpoint as a package for ONNX Runtime GenAI: fused attention, 4-bit MatMulNBits weights, tokenizer and search settings."""

from typing import TYPE_CHECKING

from compression.lazy import lazy_names
from export.genai.check import GenaiSettings, check_genai

if TYPE_CHECKING:
    from export.genai.writer import export_genai

__all__ = ["GenaiSettings", "check_genai", "export_genai"]
__getattr__ = lazy_names(__name__, export_genai="export.genai.writer")
