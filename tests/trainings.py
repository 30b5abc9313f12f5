"""The training functions with their settings as loose keywords, so that a test names only what it is about."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from compression.context import Context
from compression.distillation import CacheSettings, DistillationSettings, Objective, ObjectiveSettings, distill
from compression.finetuning import FinetuningSettings, finetune
from compression.pruning.lottery import prune_lottery
from compression.pruning.rigl import prune_rigl
from compression.pruning.settings import LotterySettings, RigLSettings
from compression.training import FixedMasks, TrainingRows, TrainingRun, TrainingSettings, train
from compression.training.batches import HeldOut

OF_THE_CALL = ("teacher", "cache", "layers", "seed", "max_logits")
Metrics = dict[str, float]


def build_objective(student: PreTrainedModel, **parameters: Any) -> Objective:
    """Only the terms that are named, at temperature 1 unless it is named."""
    call = {name: parameters.pop(name) for name in OF_THE_CALL if name in parameters}
    return Objective(student, ObjectiveSettings(**{"alpha": 0.0, "temperature": 1.0, **parameters}), **call)


def run_training(
    objective: nn.Module, rows: torch.Tensor, *, settings: TrainingSettings, context: Context, mask: torch.Tensor | None = None,
    validation: HeldOut | None = None, masks: FixedMasks | None = None, **run: Any,
) -> Metrics:  # fmt: skip
    """`run` are the fields of TrainingRun, of which `workdir` is needed."""
    complete = TrainingRun(**{"name": "toy", "origin": {}, **run})
    return train(objective, TrainingRows(rows, mask, validation), settings, complete, context=context, masks=masks)


def run_distillation(
    student: Path, teacher: Path, out: Path, rows: torch.Tensor, *, settings: TrainingSettings, workdir: Path, context: Context, **terms: Any
) -> Metrics:  # fmt: skip
    validation, cache_folder = terms.pop("validation", None), terms.pop("cache_folder", None)
    teacher_cache: CacheSettings | None = terms.pop("teacher_cache", None)
    if teacher_cache is not None:
        terms |= {"teacher_cache": teacher_cache.keep, "top_k": teacher_cache.top_k, "cache_dtype": teacher_cache.dtype}
    complete = DistillationSettings(**settings.model_dump(), **terms)
    data = TrainingRows(rows, None, validation)
    return distill(student, teacher, out, data, complete, workdir=workdir, context=context, cache_folder=cache_folder)


def run_finetuning(
    model: Path, out: Path, rows: torch.Tensor, *, settings: TrainingSettings, workdir: Path, context: Context, **parameters: Any
) -> Metrics:
    mask, validation, adapter_out = (parameters.pop(name, None) for name in ("mask", "validation", "adapter_out"))
    complete = FinetuningSettings(**settings.model_dump(), **parameters)
    return finetune(model, out, TrainingRows(rows, mask, validation), complete, workdir=workdir, context=context, adapter_out=adapter_out)


def run_rigl(
    model: Path, out: Path, rows: torch.Tensor, *, settings: TrainingSettings, workdir: Path, context: Context, **parameters: Any
) -> Metrics:
    return prune_rigl(model, out, TrainingRows(rows), RigLSettings(**settings.model_dump(), **parameters), workdir=workdir, context=context)


def run_lottery(
    model: Path, out: Path, rows: torch.Tensor, *, settings: TrainingSettings, workdir: Path, context: Context,
    validation: HeldOut | None = None, **parameters: Any,
) -> Metrics:  # fmt: skip
    complete = LotterySettings(**settings.model_dump(), **parameters)
    return prune_lottery(model, out, TrainingRows(rows, None, validation), complete, workdir=workdir, context=context)
