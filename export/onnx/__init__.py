"""A checkpoint as one ONNX graph with a KV cache, which prefills on an empty cache and decodes on a full one.

Inputs   `input_ids`, `position_ids` int64 [batch, sequence]; `past_key_values.{layer}.key|value` [batch, kv_heads, past, head_dim]
Outputs  `logits` [batch, sequence, vocabulary]; `present.{layer}.key|value` [batch, kv_heads, total, head_dim], total = past + sequence
"""

from export.onnx.writer import export_onnx as export_onnx
