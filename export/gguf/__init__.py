"""Write a checkpoint as one GGUF file for llama.cpp: tensors, tokenizer and metadata, with llama.cpp itself as quantizer and judge."""

from typing import TYPE_CHECKING

from compression.lazy import lazy_names
from export.gguf.check import GgufSettings, check_gguf

if TYPE_CHECKING:
    from export.gguf.writer import export_gguf

__all__ = ["GgufSettings", "check_gguf", "export_gguf"]
__getattr__ = lazy_names(__name__, export_gguf="export.gguf.writer")
