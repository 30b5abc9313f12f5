"""Fine-tuning on next tokens: every weight, or low-rank adapters that are merged afterwards."""

from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from compression.checkpoints.checkpoint import file_digests, open_checkpoint
from compression.checkpoints.masks import read_masks
from compression.context import Context
from compression.distillation import NEXT_TOKENS, Objective
from compression.finetuning.adapters import adapt, copy_adapters, mask_updates, merged, open_in_4_bits, save_adapters
from compression.finetuning.settings import FinetuningSettings, check_method
from compression.training import TrainingRows, TrainingRun, open_student, processes, save_student, train
from compression.training.loop import seeded
from compression.training.students import check_student


def finetune(
    model: Path,
    out: Path,
    data: TrainingRows,
    settings: FinetuningSettings,
    *,
    workdir: Path,
    context: Context,
    adapter_out: Path | None = None,
) -> dict[str, float]:
    """Minimise cross-entropy on next tokens, and write the dense model to `out` in the dtype of `model`.

    A sparse model stays as sparse as its masks: pruned weights stay zero, and an adapter's update is masked in training as in
    the merge.

    Args:
        model: A dense checkpoint.
        out: The directory to write.
        data: Rows of tokens, their targets, and rows for early stopping.
        settings: The method and the training.
        workdir: Holds the checkpoints of the unfinished training.
        context: Device, seed and callbacks.
        adapter_out: Where to keep the adapter, as peft opens it.

    Returns:
        The metrics of `compression.training.loop.train` with trainable_parameters.

    Raises:
        Incompatible: The model is quantized, dora is to train a sparse one, or adapters are to be put on a tied embedding or head.
        MissingExtra: qlora without bitsandbytes.
        UnusableModel: The model cannot be read.
        UnusableData: The rows cannot be trained on.
        EdgepressError: A module does not exist, or the merged model differs from what was trained.
    """
    method = settings.method
    checkpoint = open_checkpoint(model)
    check_method(checkpoint, method, settings.target_modules)
    check_student(checkpoint, data.rows)
    student = open_in_4_bits(model, context) if method == "qlora" else open_student(model, data.rows, context)

    def adapted(base: PreTrainedModel) -> PeftModel:
        with seeded(context.seed):
            adapters = adapt(base, settings, context=context)
        mask_updates(adapters, read_masks(model))
        return adapters

    adapters = None if method == "full" else adapted(student)
    origin: dict[str, Any] = {"method": method, "student": file_digests(model)}
    if adapters is not None:
        origin |= settings.model_dump(include={"rank", "alpha", "dropout", "target_modules", "rank_pattern"})
    objective = Objective(student, NEXT_TOKENS)  # peft puts the adapters into the student itself
    trainable = sum(parameter.numel() for parameter in objective.parameters() if parameter.requires_grad)
    metrics = train(objective, data, settings, TrainingRun(f"fine-tune ({method})", origin, workdir), context=context)
    if adapters is not None:
        if adapter_out is not None and processes.is_first():
            save_adapters(adapters, adapter_out)
        if method == "qlora":  # the update was learned over 4-bit weights, and is merged into the full-precision ones
            full = adapted(open_student(model, data.rows, context))
            copy_adapters(adapters, full)
            adapters = full
        student = merged(adapters, data.rows)
    save_student(student, out, like=model)
    return metrics | {"trainable_parameters": float(trainable)}
