"""The importance matrix of llama.cpp's quantizer, gathered on the calibration walk: how much an error in each column of a matrix weighs.

Rounding weights w to w' costs the layer's output, in the mean over its inputs x, about sum_i E[x_i^2] (w_i - w'_i)^2 in each row: E[x_i^2]
is what the quantizer weighs columns by when it looks for scales.
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch

from compression.calibration.walk import Walk
from compression.checkpoints.checkpoint import Checkpoint, open_checkpoint
from compression.checkpoints.layouts import read_quantized_linears
from compression.checkpoints.loading import copy_tokenizer
from compression.checkpoints.shards import CheckpointWriter, read_tensors
from compression.context import Context
from export.gguf.tensors import PACKED

FLOOR = 1e-6  # of the mean: a column that the calibration data never touches still has a weight, or its block would have no scale


def gather_importance(checkpoint: Checkpoint, windows: torch.Tensor, context: Context, *, work: Path) -> dict[str, np.ndarray]:
    """Mean squares of what every linear layer and the head read, float32 [width], by the parameter's name in the checkpoint.

    windows  token ids, int64 [count, length]
    work     a directory for the float32 weights of a quantized checkpoint, which the walk needs
    Raises what compression.calibration.walk.Walk raises.
    """
    walked = checkpoint if checkpoint.layout == "dense" else _dequantized(checkpoint, work)
    walk = Walk(walked, windows, collect=frozenset({"mean_square"}), context=context)
    found: dict[str, np.ndarray] = {}
    for block in walk:
        for shared in block.each_input():
            assert shared.mean_square is not None
            found |= dict.fromkeys([f"{block.name}.{path}.weight" for path in shared.layers], _floored(shared.mean_square))
    family = checkpoint.family
    norm, total, tokens = walk.model.get_submodule(family.norm), torch.zeros(checkpoint.hidden_size), 0
    for batch in range(len(walk.states)):
        states = norm(walk.states[batch].to(context.device, next(norm.parameters()).dtype)).flatten(0, 1)
        total += states.float().square().sum(0).cpu()
        tokens += len(states)
    return found | {f"{family.embed if checkpoint.tied else family.head}.weight": _floored(total / tokens)}


def _floored(mean_square: torch.Tensor) -> np.ndarray:
    floor = FLOOR * mean_square.mean()
    return (mean_square.clamp(min=floor) if floor > 0 else torch.ones_like(mean_square)).cpu().numpy()


def _dequantized(checkpoint: Checkpoint, out: Path) -> Checkpoint:
    """The dense checkpoint that a GPTQ or AWQ one stands for, layer by layer."""
    writer = CheckpointWriter(out)
    weights: list[str] = []
    for module, layer in read_quantized_linears(checkpoint.path):
        weights.append(f"{module}.weight")
        writer.add({weights[-1]: layer.dequantize()})
    others = [name for name in checkpoint.tensors if not name.endswith(tuple(f".{part}" for part in PACKED))]
    writer.add(read_tensors(checkpoint.path, others))
    copy_tokenizer(checkpoint.path, out)
    writer.finish({key: value for key, value in checkpoint.config.items() if key != "quantization_config"}, names=weights + others)
    return dataclasses.replace(open_checkpoint(out), sparse=False)
