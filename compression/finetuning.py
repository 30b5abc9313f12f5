"""Fine-tuning on next tokens: every weight, or low-rank adapters that are merged afterwards."""

from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import PreTrainedModel

from compression.context import Context
from compression.distillation.objective import Objective
from compression.errors import EdgepressError
from compression.training import open_student, save_student, seeded, train
from compression.training_settings import TrainingSettings


def finetune(
    model: Path, out: Path, rows: torch.Tensor, *, mask: torch.Tensor | None = None, method: Literal["lora", "full"] = "lora",
    rank: int = 16, alpha: int = 32, dropout: float = 0.0, target_modules: str | list[str] = "all-linear", settings: TrainingSettings,
    workdir: Path, context: Context, adapter_out: Path | None = None,
) -> dict[str, float]:  # fmt: skip
    """Minimise cross-entropy on next tokens, and write the dense model to `out` in the dtype of `model`.

    method          "full", or "lora": W + (alpha / rank)·B·A (Hu et al., "LoRA", 2021), merged in float32
    target_modules  of LoRA: "all-linear" (every linear layer but the output head), names or endings of names, or a pattern
    adapter_out     where the adapter is kept as peft opens it
    rows, mask      int64 and bool [n, length]: packed tokens, true where a token is a target; None takes all

    Returns the metrics of `compression.training.train` with trainable_parameters.
    Raises Incompatible (a sparse or quantized model), UnusableModel, UnusableData, EdgepressError (a module that does not exist).
    """
    student = open_student(model, rows, context)
    adapted = None
    if method == "lora":
        with seeded(context.seed):  # A is drawn at random, B starts at zero
            adapted = _adapt(student, rank, alpha, dropout, target_modules)
    objective = Objective(student, beta=1.0)  # peft puts the adapters into the student itself
    trainable = sum(parameter.numel() for parameter in objective.parameters() if parameter.requires_grad)
    metrics = train(objective, rows, mask=mask, settings=settings, workdir=workdir, context=context, what=f"fine-tune ({method})")
    if adapted is not None:
        if adapter_out is not None:
            _save_adapter(adapted, adapter_out)
        student = adapted.merge_and_unload()
    save_student(student, out, like=model)
    return metrics | {"trainable_parameters": float(trainable)}


def _adapt(student: PreTrainedModel, rank: int, alpha: int, dropout: float, target_modules: str | list[str]) -> PeftModel:
    config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_modules, bias="none")
    try:
        return get_peft_model(student, config)
    except ValueError as error:
        raise EdgepressError(f"LoRA cannot be put on target_modules {target_modules!r}: {error}", key="target_modules") from error


def _save_adapter(adapted: PeftModel, out: Path) -> None:
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
