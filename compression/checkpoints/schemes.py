"""What a compressed-tensors checkpoint rounds to, and how its config says so. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from compression.checkpoints.checkpoint import Checkpoint
from compression.errors import UnusableModel

FORMATS = {"int": "int-quantized", "float": "float-quantized"}


@dataclass(frozen=True)
class Scheme:
    """8-bit weights with fixed scales, and 8-bit inputs of the same type whose scales are computed token by token while the model runs. All symmetric.

    Attributes:
        type: "int" is −128 … 127, "float" is E4M3 (largest 448).
        strategy: One weight scale for each output channel ("channel"), or one for the whole matrix ("tensor").
    """

    type: Literal["int", "float"]
    strategy: Literal["channel", "tensor"] = "channel"

    def config(self, ignore: Sequence[str] = ("lm_head",)) -> dict[str, Any]:
        """Build `quantization_config` of a checkpoint in which every linear layer is rounded so, except those at the paths `ignore`."""
        number = {"num_bits": 8, "type": self.type, "symmetric": True, "group_size": None}
        group = {
            "targets": ["Linear"], "weights": {**number, "strategy": self.strategy, "dynamic": False},
            "input_activations": {**number, "strategy": "token", "dynamic": True}, "output_activations": None, "format": FORMATS[self.type],
        }  # fmt: skip
        return {
            "quant_method": "compressed-tensors", "format": FORMATS[self.type], "quantization_status": "compressed",
            "config_groups": {"group_0": group}, "ignore": list(ignore), "kv_cache_scheme": None,
        }  # fmt: skip


def read_scheme(checkpoint: Checkpoint) -> Scheme:
    """Read the scheme of a compressed-tensors checkpoint. Raises UnusableModel where it has several, or one that `Scheme` cannot express."""
    config = checkpoint.config.get("quantization_config", {})
    groups = list(config.get("config_groups", {}).values())
    for scheme in (Scheme("int"), Scheme("int", "tensor"), Scheme("float"), Scheme("float", "tensor")):
        ours = scheme.config()
        expected = ours["config_groups"]["group_0"]
        same = config.get("format") == ours["format"] and not config.get("kv_cache_scheme")
        if same and groups and all(_agrees(group, expected) for group in groups):
            return scheme
    raise UnusableModel(
        f"{checkpoint.path}: its compressed-tensors scheme is not read; edgepress reads {' and '.join(FORMATS.values())} with symmetric 8-bit "
        "weights (strategy channel or tensor, static), inputs of the same type (strategy token, dynamic), and nothing else rounded",
        key="model",
    )


def _agrees(group: Any, expected: dict[str, Any]) -> bool:
    """Whether a config group says what `expected` does; other keys (observers) tell how it was made."""
    if not isinstance(group, dict) or group.get("output_activations") or group.get("format", expected["format"]) != expected["format"]:
        return False
    decisive = ("num_bits", "type", "symmetric", "strategy", "dynamic")
    parts = ("weights", "input_activations")
    return all(isinstance(group.get(p), dict) and all(group[p].get(k) == expected[p][k] for k in decisive) for p in parts)
