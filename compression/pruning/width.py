"""Width pruning: whole MLP neurons leave, so that a smaller ordinary model remains."""

import math
from pathlib import Path

import torch
from safetensors.torch import save_file

from compression.checkpoint import open_checkpoint
from compression.context import Context
from compression.errors import Incompatible
from compression.loading import copy_tokenizer
from compression.pruning import pruned_width
from compression.shards import CheckpointWriter, read_tensors

K_QUANT_WIDTH = 256  # llama.cpp's K-quants take rows in blocks of 256
KEPT = "kept.safetensors"


def prune_width(checkpoint: Path, out: Path, *, keep: float, multiple_of: int = 32, context: Context) -> dict[str, float]:
    """Keep the strongest share `keep` of the MLP neurons of every block (`neuron_norms`) and write the smaller dense model to `out`.

    Widths are uniform over the blocks: `pruned_width(intermediate_size, keep, multiple_of)`. `kept.safetensors` beside the weights
    holds the kept neurons of every block, int32 [width], ascending, under the path of its MLP's down projection.

    Returns `kept_ratio` (neurons kept, really reached), `intermediate_size` and `parameters_ratio`.
    Raises Incompatible for a sparse or quantized checkpoint, or a keep or multiple_of that fits no width.
    """
    source = open_checkpoint(checkpoint)
    if source.layout != "dense" or source.sparse:
        raise Incompatible(f"{checkpoint} is {'sparse' if source.sparse else source.layout}; width pruning takes a dense checkpoint")
    width = pruned_width(source.intermediate_size, keep, multiple_of)
    if width % K_QUANT_WIDTH:
        context.warn(
            f"the pruned MLP is {width} wide, no multiple of {K_QUANT_WIDTH}: llama.cpp's K-quants fall back to larger types "
            f"for its down projection; multiple_of: {K_QUANT_WIDTH} avoids that"
        )
    writer = CheckpointWriter(out)
    kept: dict[str, torch.Tensor] = {}
    written: set[str] = set()
    for index in range(source.num_layers):
        context.progress(index, source.num_layers, f"block {index + 1} of {source.num_layers}")
        gate, up, down = (f"{source.family.blocks}.{index}.{path}" for path in source.family.mlp)
        # A gate or up projection may have a bias for each neuron; the bias of the down projection has none to lose.
        names = [f"{path}.{part}" for path in (gate, up, down) for part in ("weight", "bias") if f"{path}.{part}" in source.tensors]
        tensors = read_tensors(checkpoint, names)
        neurons = strongest(neuron_norms(*(tensors[f"{path}.weight"] for path in (gate, up, down))), width)
        kept[down] = neurons.to(torch.int32)
        tensors |= {name: tensor[neurons] for name, tensor in tensors.items() if not name.startswith(f"{down}.")}
        tensors[f"{down}.weight"] = tensors[f"{down}.weight"][:, neurons]
        writer.add(tensors)
        written |= set(names)
    writer.add(read_tensors(checkpoint, [name for name in source.tensors if name not in written]))
    copy_tokenizer(checkpoint, out)
    save_file(kept, out / KEPT)
    writer.finish(source.config | {"intermediate_size": width})
    context.progress(source.num_layers, source.num_layers, "pruned")
    after = sum(math.prod(info.shape) for info in open_checkpoint(out).tensors.values())
    before = sum(info.numel for info in source.tensors.values())
    return {"kept_ratio": width / source.intermediate_size, "intermediate_size": float(width), "parameters_ratio": after / before}


def neuron_norms(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """The layer-wise L2 norm of each MLP neuron's weights (arXiv 2505.18166): √(‖gate_j‖² + ‖up_j‖² + ‖down_:j‖²), float64 [intermediate].

    gate, up  [intermediate, hidden]: row j belongs to neuron j
    down      [hidden, intermediate]: column j belongs to neuron j
    """
    return (gate.double().square().sum(1) + up.double().square().sum(1) + down.double().square().sum(0)).sqrt()


def strongest(norms: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` largest values, ascending; of equal ones the first."""
    return norms.argsort(descending=True, stable=True)[:count].sort().values
