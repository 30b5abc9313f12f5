"""Low-rank adapters through peft: add them, keep a sparse base sparse under them, save and merge them."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from compression.context import Context
from compression.errors import EdgepressError, Incompatible
from compression.finetuning.settings import TIED, FinetuningSettings
from compression.training.masks import zero_pruned

LARGEST_DIVERGENCE = 1e-3  # mean KL of a merged model from the one with separate adapters, in nats; rounding gives far less
_COMPARED = (2, 64)  # rows and tokens
_IN_PEFT = "base_model.model."  # what peft puts before the names of a model's modules


def open_in_4_bits(path: Path, context: Context) -> PreTrainedModel:
    """Load a checkpoint with its blocks' linear layers in NF4, scales quantized too (QLoRA, arXiv 2305.14314), and the rest in float32."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
    )
    return AutoModelForCausalLM.from_pretrained(
        path, quantization_config=config, dtype=torch.float32, device_map={"": context.device}, local_files_only=True,
        use_safetensors=True, trust_remote_code=False,
    ).eval()  # fmt: skip


def adapt(student: PreTrainedModel, settings: FinetuningSettings, *, context: Context) -> PeftModel:
    """Add new adapters to a model, which is frozen. A is drawn from torch's generator, B is zero.

    Args:
        student: The model.
        settings: Rank, scale, dropout and modules; method "dora" learns a norm for every row.
        context: Its `warn` gets the layers without adapter.

    Raises:
        EdgepressError: A module does not exist.
        Incompatible: A module takes no adapter.
    """
    target_modules = settings.target_modules
    routers = _routers(student)
    if routers and target_modules == "all-linear":
        context.warn(
            f"{len(routers)} linear layers return more than a product (routers of experts) and get no adapter: {', '.join(routers)}"
        )
    config = LoraConfig(
        task_type="CAUSAL_LM", r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=target_modules,
        rank_pattern=dict(settings.rank_pattern), use_dora=settings.method == "dora", bias="none",
        exclude_modules=routers if routers and target_modules == "all-linear" else None,
    )  # fmt: skip
    try:
        adapted = get_peft_model(student, config)
    except ValueError as error:
        raise EdgepressError(f"LoRA cannot be put on target_modules {target_modules!r}: {error}", key="target_modules") from error
    paths = _layers(adapted)
    if wrong := [path for path in routers if path in paths]:
        raise Incompatible(
            f"target_modules {target_modules!r} names {wrong[0]}, which returns more than a product (a router of experts), so it takes "
            "no adapter; name other modules",
            key="target_modules",
        )
    ends = (student.get_input_embeddings(), student.get_output_embeddings())
    if getattr(ends[0], "weight", None) is getattr(ends[1], "weight", None) and (
        wrong := [path for path, part in paths.items() if part in ends]
    ):
        raise Incompatible(TIED.format(wrong[0]), key="target_modules")
    pattern = r"(.*\.)?({})"  # as peft matches
    unused = [name for name in settings.rank_pattern if not any(re.fullmatch(pattern.format(name), path) for path in paths)]
    if unused:
        raise EdgepressError(f"rank_pattern names {', '.join(unused)}, and no layer with an adapter has this name", key="rank_pattern")
    return adapted


@torch.no_grad()
def _routers(model: PreTrainedModel) -> list[str]:
    """Return the paths of linear layers that return something else than a tensor, found by a run over a few tokens."""
    found: list[str] = []

    def check(path: str, output: Any) -> None:
        if not isinstance(output, torch.Tensor):
            found.append(path)

    linears = [(path, part) for path, part in model.named_modules() if isinstance(part, nn.Linear)]
    hooks = [part.register_forward_hook(lambda _, __, output, path=path: check(path, output)) for path, part in linears]
    model(input_ids=torch.arange(min(8, model.config.vocab_size), device=model.device)[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def mask_updates(adapted: PeftModel, masks: Mapping[str, torch.Tensor]) -> None:
    """Make layers whose weight has a mask M compute x·(W + M ⊙ s·B·A)ᵀ.

    What is trained is then what `merged` returns: an update that is zero where the base is pruned.

    Args:
        adapted: The model with its adapters.
        masks: bool [out, in] by the weight's name in the model.
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
    """Return the layers with an adapter, by their path in the model."""
    return {path.removeprefix(_IN_PEFT): part for path, part in adapted.named_modules() if isinstance(part, LoraLayer)}


def merged(adapted: PeftModel, rows: torch.Tensor) -> PreTrainedModel:
    """Merge the adapters into the weights, in the precision of the weights; what masks prune is zero.

    Args:
        adapted: The model with its adapters.
        rows: int64 [n, length]; the merged model is compared on the first of them.

    Raises:
        EdgepressError: The merged model's next tokens differ from those of the model with separate adapters.
    """
    sample = rows[: _COMPARED[0], : _COMPARED[1]].to(adapted.device)
    before = _log_probabilities(adapted, sample)
    model = adapted.merge_and_unload()
    zero_pruned(model)
    after = _log_probabilities(model, sample)
    divergence = float((before.exp() * (before - after)).sum(-1).mean())
    if not divergence <= LARGEST_DIVERGENCE:  # nor is a NaN
        raise EdgepressError(
            f"the merged model is not what was trained: its next tokens diverge from those of the model with its adapters by {divergence:.3g} "
            f"nats, and {LARGEST_DIVERGENCE:g} is the most that rounding explains; name other target_modules, or take method: full",
            key="target_modules",
        )
    return model


@torch.no_grad()
def _log_probabilities(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Return those of the next tokens, float32 [rows, length, vocabulary]."""
    return model.eval()(input_ids=rows, use_cache=False).logits.float().log_softmax(-1)


def copy_adapters(source: PeftModel, target: PeftModel) -> None:
    """Copy the adapters of `source` to `target`, whose base may have another precision."""
    set_peft_model_state_dict(target, get_peft_model_state_dict(source))


def save_adapters(adapted: PeftModel, out: Path) -> None:
    """Save weights and config alone: peft's own saving adds a card, and the path of this machine's base model."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in get_peft_model_state_dict(adapted).items()}
    save_file(weights, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config = adapted.peft_config["default"]
    config.base_model_name_or_path = None
    for name in ("target_modules", "exclude_modules"):
        if isinstance(value := getattr(config, name), set):
            setattr(config, name, sorted(value))  # a set has another order in every process
    config.inference_mode = True
    config.save_pretrained(str(out))
