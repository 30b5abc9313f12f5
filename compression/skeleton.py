"""Models without weights, and where their linear layers are."""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from compression.checkpoint import Checkpoint
from compression.errors import Incompatible


def skeleton(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a checkpoint without weights, on the meta device."""
    config = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


def linear_layers(model: nn.Module, checkpoint: Checkpoint) -> list[str]:
    """Paths of all linear layers of a model.

    Raises Incompatible where matrices of its blocks are not the weights of linear layers (experts in one tensor, convolutions).
    """
    found = [path for path, part in model.named_modules() if isinstance(part, nn.Linear)]
    wrong = sorted({name.removesuffix(".weight") for name in checkpoint.linear_tensors()} - set(found))
    if wrong:
        shown = ", ".join(wrong[:4])
        raise Incompatible(
            f"{checkpoint.path}: {shown} of its blocks are no linear layers (nn.Linear), so they cannot be compressed", key="model"
        )
    return found


def layers_outside(checkpoint: Checkpoint) -> list[str]:
    """Paths of the linear layers outside a model's blocks, sorted: its head, and in some families more. Raises what `linear_layers` does."""
    inside = {name.removesuffix(".weight") for name in checkpoint.linear_tensors()}
    return sorted(set(linear_layers(skeleton(checkpoint), checkpoint)) - inside)
