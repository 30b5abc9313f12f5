"""Write a checkpoint as one OpenVINO graph that keeps its KV cache itself.

Inputs   `input_ids`, `position_ids` int64 [batch, sequence]; `beam_idx` int32 [batch], the rows of the cache that the batch continues
Output   `logits` float32 [batch, sequence, vocabulary]
State    keys and values of every layer, empty after `reset_state`
"""

from typing import TYPE_CHECKING

from compression.lazy import lazy_names
from export.openvino.check import OpenvinoSettings, check_openvino

if TYPE_CHECKING:
    from export.openvino.writer import export_openvino

__all__ = ["OpenvinoSettings", "check_openvino", "export_openvino"]
__getattr__ = lazy_names(__name__, export_openvino="export.openvino.writer")
