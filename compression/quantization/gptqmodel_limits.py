"""What GPTQModel 7.6 does not take although we do. Imports no torch."""

from typing import Literal

from compression.checkpoints.checkpoint import Checkpoint
from compression.errors import Incompatible
from compression.quantization.settings import AWQSettings, GPTQSettings, plan_schemes

EngineMethod = Literal["gptq", "awq"]
AWQ_ROWS = 64  # in which it searches clips
SPLIT = "it takes the fused layers apart, and its checkpoint no longer opens as this architecture"
REFUSED: dict[tuple[str, EngineMethod], str] = {
    ("phi3", "gptq"): SPLIT,
    ("phi3", "awq"): SPLIT,
    ("gemma3_text", "awq"): "its AWQ does not pass Gemma 3's rotary embedding the type of the layer, and fails",
}


def engine_method(settings: GPTQSettings | AWQSettings) -> EngineMethod:
    """Return the method that settings belong to."""
    return "awq" if isinstance(settings, AWQSettings) else "gptq"


def check_gptqmodel(source: Checkpoint, settings: GPTQSettings | AWQSettings) -> None:
    """Refuse what GPTQModel cannot quantize.

    Raises:
        Incompatible: Key "engine" where `engine: edgepress` would do it, "layers" for schemes by pattern, and otherwise the key of the
            parameter ("bits", "group_size") or input ("model") that fits neither engine.
    """
    method = engine_method(settings)
    if isinstance(settings, GPTQSettings) and (settings.layers or settings.on_indivisible != "refuse"):
        raise Incompatible(
            "engine: gptqmodel takes the same bits and groups for all layers here; engine: edgepress takes patterns", key="layers"
        )
    if source.layout != "dense":
        raise Incompatible(f"{source.path} is quantized already ({source.layout}); GPTQModel takes a dense checkpoint", key="model")
    if source.sparse:
        raise Incompatible(f"{source.path} carries masks, which GPTQModel does not keep; engine: edgepress does", key="engine")
    plan_schemes(source, bits=settings.bits, group_size=settings.group_size)
    if reason := REFUSED.get((source.model_type, method)):
        raise Incompatible(f"GPTQModel does not take {source.model_type} with {method}: {reason}; engine: edgepress does", key="engine")
    for layer, (rows, _) in source.linear_widths().items() if method == "awq" else ():
        if rows % AWQ_ROWS:
            raise Incompatible(
                f"GPTQModel's AWQ searches clips in runs of {AWQ_ROWS} outputs, and {layer} has {rows}; engine: edgepress takes any",
                key="engine",
            )
