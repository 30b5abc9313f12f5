"""Write a checkpoint as one ONNX graph with a KV cache, which prefills on an empty cache and decodes on a full one.

Inputs   `input_ids`, `position_ids` int64 [batch, sequence]; `past_key_values.{layer}.key|value` [batch, kv_heads, past, head_dim]
Outputs  `logits` [batch, sequence, vocabulary]; `present.{layer}.key|value` [batch, kv_heads, total, head_dim], total = past + sequence
"""

from typing import TYPE_CHECKING

from compression.lazy import lazy_names
from export.onnx.check import OnnxSettings, check_onnx

if TYPE_CHECKING:
    from export.onnx.writer import export_onnx

__all__ = ["OnnxSettings", "check_onnx", "export_onnx"]
__getattr__ = lazy_names(__name__, export_onnx="export.onnx.writer")
