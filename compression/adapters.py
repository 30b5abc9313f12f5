"""Low-rank adapters through peft: putting them on, keeping a sparse base sparse under them, saving and merging them."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from compression.context import Context
from compression.errors import EdgepressError

_IN_PEFT = "base_model.model."  # what peft puts before the names of a model's modules


def open_in_4_bits(path: Path, context: Context) -> PreTrainedModel:
    """A checkpoint with its blocks' linear layers in NF4, scales quantized too (QLoRA: Dettmers et al., arXiv 2305.14314), float32 else."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
    )
    return AutoModelForCausalLM.from_pretrained(
        path, quantization_config=config, dtype=torch.float32, device_map={"": context.device}, local_files_only=True,
        use_safetensors=True, trust_remote_code=False,
    ).eval()  # fmt: skip


def adapt(
    student: PreTrainedModel, *, rank: int, alpha: int, dropout: float, target_modules: str | list[str], rank_pattern: Mapping[str, int],
    magnitudes: bool,
) -> PeftModel:  # fmt: skip
    """Put new adapters into a model, which is frozen. A is drawn from torch's generator, B is zero.

    magnitudes  a learned norm for every row (DoRA)
    Raises EdgepressError for a module that does not exist.
    """
    config = LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_modules,
        rank_pattern=dict(rank_pattern), use_dora=magnitudes, bias="none",
    )  # fmt: skip
    try:
        adapted = get_peft_model(student, config)
    except ValueError as error:
        raise EdgepressError(f"LoRA cannot be put on target_modules {target_modules!r}: {error}", key="target_modules") from error
    paths = _layers(adapted)
    unused = [name for name in rank_pattern if not any(re.fullmatch(rf"(.*\.)?({name})", path) for path in paths)]  # as peft matches
    if unused:
        raise EdgepressError(f"rank_pattern names {', '.join(unused)}, and no layer with an adapter is called so", key="rank_pattern")
    return adapted


def mask_updates(adapted: PeftModel, masks: Mapping[str, torch.Tensor]) -> None:
    """Let layers whose weight has a mask M, bool [out, in] by the weight's name in the model, compute x·(W + M ⊙ s·B·A)ᵀ.

    What is trained is then what `merged` gives: an update that is zero where the base is pruned.
    """
    for path, layer in _layers(adapted).items():
        if f"{path}.weight" in masks:
            _mask_update(layer, masks[f"{path}.weight"])


def _mask_update(layer: Any, mask: torch.Tensor) -> None:
    kept = mask.to(layer.lora_A["default"].weight.device)

    def forward(x: torch.Tensor) -> torch.Tensor:
        return layer.base_layer(x) + functional.linear(layer.lora_dropout["default"](x), layer.get_delta_weight("default") * kept)

    layer.forward = forward


def _layers(adapted: PeftModel) -> dict[str, LoraLayer]:
    """The layers with an adapter, by their path in the model."""
    return {path.removeprefix(_IN_PEFT): part for path, part in adapted.named_modules() if isinstance(part, LoraLayer)}


def merged(adapted: PeftModel) -> PreTrainedModel:
    """The model with its adapters added in, in the precision of its weights."""
    return adapted.merge_and_unload()


def copy_adapters(source: PeftModel, target: PeftModel) -> None:
    """Let `target` have the adapters of `source`, whose base may be held in another precision."""
    set_peft_model_state_dict(target, get_peft_model_state_dict(source))


def save_adapters(adapted: PeftModel, out: Path) -> None:
    """Weights and config alone: peft's own saving adds a card, and the path of this machine's base model."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in get_peft_model_state_dict(adapted).items()}
    save_file(weights, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config = adapted.peft_config["default"]
    config.base_model_name_or_path = None
    if isinstance(config, LoraConfig) and isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)  # a set has another order in every process
    config.inference_mode = True
    config.save_pretrained(str(out))
