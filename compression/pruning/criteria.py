"""Score the units of a block: neurons of the MLP, query heads, or key/value heads with their query heads.

The output of a unit is a run of neighbouring input channels of the projection behind it (down, out), the same number for every unit.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import nn

from compression.calibration.walk import walk
from compression.checkpoints.checkpoint import Checkpoint
from compression.checkpoints.loading import load_model
from compression.context import Context

TOKENS_PER_BACKWARD = 1024


def unit_norms(incoming: Sequence[torch.Tensor], outgoing: torch.Tensor, units: int) -> torch.Tensor:
    """Return the L2 norm of all weights of each unit (arXiv 2505.18166), float64 [units].

    For a neuron that is √(‖gate_j‖² + ‖up_j‖² + ‖down_:j‖²).

    Args:
        incoming: Gate and up, or query, key and value: [units · n, hidden], n any number. Row i belongs to unit i // n.
        outgoing: Down, or out: [hidden, units · n]. Column i belongs to unit i // n.
        units: The number of units.
    """
    squares = [weight.double().square().sum(1) for weight in incoming] + [outgoing.double().square().sum(0)]
    return sum((square.view(units, -1).sum(1) for square in squares), torch.zeros(units, dtype=torch.float64)).sqrt()


def activation_scores(
    checkpoint: Checkpoint, windows: torch.Tensor, units: Mapping[str, int], *, context: Context
) -> dict[str, torch.Tensor]:
    """Compute how much each unit adds to the residual stream: √(Σ_i E[x_i²]·‖W_:i‖²) over its channels i.

    x is the input of the projection W over the calibration windows (collected on the walk). For a neuron that is exactly the root of
    E‖W_:j x_j‖²; for a head, channels count as uncorrelated. It is Wanda's metric, summed over a structure ("WIFN" in An et al., FLAP,
    arXiv 2312.11983).

    Args:
        checkpoint: A dense checkpoint.
        windows: Token ids, int64 [count, length].
        units: The number of units, by path of the projection in a block.
        context: Device and progress.

    Returns:
        float64 [units], by path of the projection in the model.
    """
    scores: dict[str, torch.Tensor] = {}
    for block in walk(checkpoint, windows, collect=frozenset({"mean_square"}), context=context):
        for shared in block.inputs:
            for path in set(shared.layers) & set(units):
                assert shared.mean_square is not None
                added = shared.mean_square.double() * block.linear(path).weight.double().square().sum(0)
                scores[f"{block.name}.{path}"] = added.view(units[path], -1).sum(1).sqrt().cpu()
    return scores


def taylor_scores(checkpoint: Checkpoint, windows: torch.Tensor, units: Mapping[str, int], *, context: Context) -> dict[str, torch.Tensor]:
    """Compute the first-order change of the loss when a unit's output becomes zero, the mean of its absolute value over the windows.

    With a gate m = 1 on each unit, that is |∂L/∂m| = |Σ x·∂L/∂x| over the unit's channels and a window's tokens, which equals |Σ w·∂L/∂w|
    over the weights behind the unit (Molchanov et al., arXiv 1906.10771; for heads Michel et al., arXiv 1905.10650). L is the mean
    cross-entropy of a window's next tokens. |·| applies to single windows: summed over all data, the gradients of a trained model cancel.
    The model is loaded, in float32 on the CPU, else in its dtype; no gradient of a weight is kept.

    Args:
        checkpoint: A dense checkpoint.
        windows: Token ids, int64 [count, length].
        units: The number of units, by path of the projection in a block.
        context: Device and progress.

    Returns:
        float64 [units], by path of the projection in the model.
    """
    on_cpu = torch.device(context.device).type == "cpu"
    model = load_model(checkpoint.path, dtype=torch.float32 if on_cpu else None, device=context.device).requires_grad_(False)
    scores = {
        f"{checkpoint.family.blocks}.{index}.{path}": torch.zeros(count, dtype=torch.float64, device=context.device)
        for index in range(checkpoint.num_layers)
        for path, count in units.items()
    }

    def count_in(score: torch.Tensor, x: torch.Tensor, gradient: torch.Tensor) -> None:
        gates = (x.detach().float() * gradient).sum(1, dtype=torch.float64).view(len(x), len(score), -1).sum(2)  # [windows, units]
        score += gates.abs().sum(0) / len(windows)

    def watch(score: torch.Tensor, _: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        (x,) = arguments
        x.register_hook(partial(count_in, score, x))

    for path, score in scores.items():
        model.get_submodule(path).register_forward_pre_hook(partial(watch, score))
    model.enable_input_require_grads()
    batches = windows.split(max(1, TOKENS_PER_BACKWARD // windows.shape[1]))
    for number, batch in enumerate(batches):
        context.progress(number, len(batches), f"gradients of batch {number + 1} of {len(batches)}")
        ids = batch.to(context.device)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss * len(ids)  # the sum of the windows' means: they are equally long
        loss.backward()
    return {path: score.cpu() for path, score in scores.items()}
