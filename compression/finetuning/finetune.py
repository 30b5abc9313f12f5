"""Fine-tuning on next tokens: every weight, or low-rank adapters that are merged afterwards."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from compression.checkpoints.checkpoint import file_digests, open_checkpoint
from compression.checkpoints.masks import read_masks
from compression.context import Context
from compression.distillation.objective import Objective
from compression.finetuning.adapters import adapt, copy_adapters, mask_updates, merged, open_in_4_bits, save_adapters
from compression.finetuning.methods import FinetuningMethod, check_method
from compression.training import processes
from compression.training.loop import seeded, train
from compression.training.settings import TrainingSettings
from compression.training.students import check_student, open_student, save_student
from compression.training.validation import HeldOut


def finetune(
    model: Path, out: Path, rows: torch.Tensor, *, mask: torch.Tensor | None = None, validation: HeldOut | None = None,
    method: FinetuningMethod = "lora", rank: int = 16, alpha: int = 32, dropout: float = 0.0, target_modules: str | list[str] = "all-linear",
    rank_pattern: Mapping[str, int] | None = None, settings: TrainingSettings, workdir: Path, context: Context,
    adapter_out: Path | None = None,
) -> dict[str, float]:  # fmt: skip
    """Minimise cross-entropy on next tokens, and write the dense model to `out` in the dtype of `model`.

    method          full   every weight
                    lora   W + (alpha / rank)·B·A (Hu et al., "LoRA", arXiv 2106.09685)
                    dora   m · (W + (alpha / rank)·B·A) / ‖W + (alpha / rank)·B·A‖, by rows (Liu et al., arXiv 2402.09353)
                    qlora  lora over a base in 4-bit NF4 (Dettmers et al., arXiv 2305.14314)
                    Adapters are merged into the float32 weights, with qlora too.
    target_modules  that get adapters: "all-linear" (every linear layer but the output head), names or endings of names, or a pattern
    rank_pattern    other ranks than `rank`, by name or pattern of the module
    adapter_out     where the adapter is kept as peft opens it
    rows, mask      int64 and bool [n, length]: packed tokens, true where a token is a target; None takes all
    validation      further ones, for early stopping

    A sparse model stays as sparse as its masks: pruned weights are held at zero, and an adapter's update is masked in training as in
    the merge.

    Returns the metrics of `compression.training.train` with trainable_parameters.
    Raises Incompatible (a quantized model, dora of a sparse one, adapters on a tied embedding or head), MissingExtra (qlora), UnusableModel,
    UnusableData, EdgepressError (a module that does not exist, a merge that is not what was trained).
    """
    checkpoint = open_checkpoint(model)
    check_method(checkpoint, method, target_modules)
    check_student(checkpoint, rows)
    student = open_in_4_bits(model, context) if method == "qlora" else open_student(model, rows, context)

    def adapted(base: PreTrainedModel) -> PeftModel:
        with seeded(context.seed):
            adapters = adapt(
                base, rank=rank, alpha=alpha, dropout=dropout, target_modules=target_modules, rank_pattern=rank_pattern or {},
                magnitudes=method == "dora", context=context,
            )  # fmt: skip
        mask_updates(adapters, read_masks(model))
        return adapters

    adapters = None if method == "full" else adapted(student)
    origin: dict[str, Any] = {"method": method, "student": file_digests(model)}
    if adapters is not None:
        origin |= {
            "rank": rank,
            "alpha": alpha,
            "dropout": dropout,
            "target_modules": target_modules,
            "rank_pattern": dict(rank_pattern or {}),
        }
    objective = Objective(student, beta=1.0)  # peft puts the adapters into the student itself
    trainable = sum(parameter.numel() for parameter in objective.parameters() if parameter.requires_grad)
    metrics = train(
        objective, rows, mask=mask, settings=settings, origin=origin, workdir=workdir, context=context, what=f"fine-tune ({method})",
        validation=validation,
    )  # fmt: skip
    if adapters is not None:
        if adapter_out is not None and processes.is_first():
            save_adapters(adapters, adapter_out)
        if method == "qlora":  # the update was learned on 4 bits, and belongs to the weights that they stand for
            full = adapted(open_student(model, rows, context))
            copy_adapters(adapters, full)
            adapters = full
        student = merged(adapters, rows)
    save_student(student, out, like=model)
    return metrics | {"trainable_parameters": float(trainable)}
