"""What GPTQModel 7.6 does not take although we do. Planning imports this module: no torch here."""

from typing import Literal

from compression.checkpoints.checkpoint import Checkpoint
from compression.errors import Incompatible
from compression.quantization.settings import plan_schemes

EngineMethod = Literal["gptq", "awq"]
BITS: dict[EngineMethod, tuple[int, ...]] = {"gptq": (2, 3, 4, 8), "awq": (4,)}
AWQ_ROWS = 64  # in which it searches clips
SPLIT = "it takes the fused layers apart, and its checkpoint no longer opens as this architecture"
REFUSED: dict[tuple[str, EngineMethod], str] = {
    ("phi3", "gptq"): SPLIT,
    ("phi3", "awq"): SPLIT,
    ("gemma3_text", "awq"): "its AWQ does not pass Gemma 3's rotary embedding the type of the layer, and fails",
}


def check_gptqmodel(source: Checkpoint, *, method: EngineMethod, bits: int, group_size: int) -> None:
    """Raises Incompatible(key="engine") where only our own engine fits; for bits, a group size or a layout that fit neither, under those keys."""
    if source.layout != "dense":
        raise Incompatible(f"{source.path} is quantized already ({source.layout}); GPTQModel takes a dense checkpoint", key="model")
    if source.sparse:
        raise Incompatible(f"{source.path} carries masks, which GPTQModel does not keep; engine: edgepress does", key="engine")
    if bits not in BITS[method]:
        raise Incompatible(f"{method} with GPTQModel has {', '.join(map(str, BITS[method]))} bits, not {bits}", key="bits")
    plan_schemes(source, bits=bits, group_size=group_size)
    if reason := REFUSED.get((source.model_type, method)):
        raise Incompatible(f"GPTQModel does not take {source.model_type} with {method}: {reason}; engine: edgepress does", key="engine")
    for layer, (rows, _) in source.linear_widths().items() if method == "awq" else ():
        if rows % AWQ_ROWS:
            raise Incompatible(
                f"GPTQModel's AWQ searches clips in runs of {AWQ_ROWS} outputs, and {layer} has {rows}; engine: edgepress takes any",
                key="engine",
            )
