"""Build models without weights, and find their linear layers."""

from collections.abc import Iterator

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from compression.checkpoints.checkpoint import Checkpoint
from compression.errors import Incompatible, first_of


def skeleton(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Build the model of a checkpoint without weights, on the meta device."""
    config = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


def linear_layers(model: nn.Module, checkpoint: Checkpoint) -> list[str]:
    """List the paths of all linear layers of a model.

    Raises Incompatible where its blocks hold `unclaimed_tensors`.
    """
    unclaimed = unclaimed_tensors(model, checkpoint)
    if unclaimed:
        sizes = {name: parameter.numel() for name, parameter in _block_parameters(model, checkpoint)}
        share = sum(sizes.get(name, 0) for name in unclaimed) / sum(sizes.values())
        shown = first_of(unclaimed)
        reason = (
            f"({share:.1%} of their parameters) are not weights of linear layers (nn.Linear) that every block has, and would stay as they are"
            if share
            else "are not in every block"
        )
        raise Incompatible(
            f"{checkpoint.path}: {len(unclaimed)} tensors of its blocks {reason}: {shown}; this model cannot be compressed yet", key="model"
        )
    return [path for path, part in model.named_modules() if isinstance(part, nn.Linear)]


def unclaimed_tensors(model: nn.Module, checkpoint: Checkpoint) -> list[str]:
    """List the names of the tensors that a method which compresses linear layers would leave as they are, or not find; sorted.

    These are the parameters of two and more dimensions in the blocks of `model` (one without weights will do), but for the weights of
    linear layers that `checkpoint.linear_tensors` names: experts in one tensor, convolutions, routers that are not linear layers, tables,
    linear layers that some blocks have and others do not; and what `linear_tensors` names and `model` does not have.
    """
    linears = {f"{path}.weight" for path, part in model.named_modules() if isinstance(part, nn.Linear)}
    named = set(checkpoint.linear_tensors())
    matrices = {name for name, parameter in _block_parameters(model, checkpoint) if parameter.dim() > 1}
    # Names that the model does not have are reported only where nothing else is wrong: otherwise they are the same tensors under the files' names.
    return sorted(matrices - (linears & named)) or sorted(named - linears)


def _block_parameters(model: nn.Module, checkpoint: Checkpoint) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of all blocks by their names in the model; one that several modules share under each of them."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.startswith(f"{checkpoint.blocks}."):
            yield name, parameter


def layers_outside(checkpoint: Checkpoint) -> list[str]:
    """List the paths of the linear layers outside a model's blocks, sorted: its head, and in some families more. Raises what `linear_layers` does."""
    inside = {name.removesuffix(".weight") for name in checkpoint.linear_tensors()}
    return sorted(set(linear_layers(skeleton(checkpoint), checkpoint)) - inside)
