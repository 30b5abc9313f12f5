"""Round the linear layers of decoder blocks after training. Importing the package imports no torch.

A method is a function, and a settings object that recipes and callers pass to it whole:

    quantize_gptq(checkpoint, out, GPTQSettings(bits=4, group_size=32), windows, context=Context())
"""

from typing import TYPE_CHECKING

from compression.lazy import lazy_names
from compression.quantization.settings import AWQSettings, FP8Settings, GPTQSettings, RTNSettings, SmoothQuantSettings

if TYPE_CHECKING:
    from compression.quantization.awq import quantize_awq
    from compression.quantization.fp8 import quantize_fp8
    from compression.quantization.gptq import quantize_gptq
    from compression.quantization.gptqmodel_engine import quantize_with_gptqmodel
    from compression.quantization.rtn import quantize_rtn
    from compression.quantization.smoothquant import quantize_smoothquant

__all__ = [
    "AWQSettings", "FP8Settings", "GPTQSettings", "RTNSettings", "SmoothQuantSettings", "quantize_awq", "quantize_fp8", "quantize_gptq",
    "quantize_rtn", "quantize_smoothquant", "quantize_with_gptqmodel",
]  # fmt: skip
__getattr__ = lazy_names(
    __name__,
    quantize_awq="compression.quantization.awq",
    quantize_fp8="compression.quantization.fp8",
    quantize_gptq="compression.quantization.gptq",
    quantize_rtn="compression.quantization.rtn",
    quantize_smoothquant="compression.quantization.smoothquant",
    quantize_with_gptqmodel="compression.quantization.gptqmodel_engine",
)
