"""Write a checkpoint as one ExecuTorch program for the XNNPACK backend, which keeps its KV cache itself.

Inputs   `input_ids` int64 [1, length], `cache_position` int64 [length]: consecutive places in the cache that the tokens take
Output   `logits` float32 [1, length, vocabulary]
State    keys and values of `max_length` tokens in every layer, float32; a call that starts at place 0 forgets all earlier tokens
Limits   `get_max_context_len`, the tokens that fit in all, and `get_max_seq_len`, those that one call reads at most: methods of the program

ExecuTorch's own runner for language models (extension/llm/runner, C++) reads these names.
"""

from typing import TYPE_CHECKING

from compression.lazy import lazy_names
from export.executorch.check import ExecutorchSettings, check_executorch

if TYPE_CHECKING:
    from export.executorch.writer import export_executorch

__all__ = ["ExecutorchSettings", "check_executorch", "export_executorch"]
__getattr__ = lazy_names(__name__, export_executorch="export.executorch.writer")
