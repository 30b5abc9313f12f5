"""Distillation: bring a compressed student back towards its teacher."""

from pathlib import Path

import torch
from torch.nn import functional

from compression.checkpoints.checkpoint import Checkpoint, file_digests, open_checkpoint
from compression.checkpoints.kept import read_kept
from compression.checkpoints.loading import load_model
from compression.context import Context
from compression.distillation.compatibility import check_length, check_vocabularies, pair_layers
from compression.distillation.objective import Objective
from compression.distillation.settings import DistillationSettings
from compression.distillation.teacher_cache import TeacherCache, open_teacher_cache
from compression.training import TrainingRows, TrainingRun, open_student, save_student, train
from compression.training.batches import check_rows
from compression.training.students import check_student


def distill(
    student: Path,
    teacher: Path,
    out: Path,
    data: TrainingRows,
    settings: DistillationSettings,
    *,
    workdir: Path,
    context: Context,
    cache_folder: Path | None = None,
) -> dict[str, float]:
    """Minimise the objective of `settings` on `data`, and write the student to `out` in its own dtype.

    Args:
        student: A dense checkpoint.
        teacher: A checkpoint with the same vocabulary; not loaded where alpha = gamma = 0.
        out: The directory to write.
        data: Rows of tokens, their targets, and rows for early stopping on the same loss.
        settings: Objective and training.
        workdir: Holds the checkpoints of the unfinished training.
        context: Device, seed and callbacks.
        cache_folder: Where a teacher cache is, for every training that needs the same outputs; by default in `workdir`.

    Returns:
        The metrics of `compression.training.loop.train`: loss, loss_kd, loss_task, loss_feature (those with a weight), ...; with a cache
        teacher_cache_mb and teacher_cache_built (1: by this call).

    Raises:
        Incompatible: The vocabularies differ, the student is quantized, or the cache cannot hold what the loss needs.
        UnusableModel: A checkpoint cannot be read.
        UnusableData: The rows cannot be trained on.
        EdgepressError: See `train`.
    """
    before = open_checkpoint(student)
    source = open_checkpoint(teacher) if settings.needs_teacher else None
    check_student(before, data.rows)
    if source is not None:
        check_vocabularies(before, source)
        check_length(source, data.rows.shape[1])
    cache: TeacherCache | None = None
    if settings.cache is not None:
        vocabulary = min(checkpoint.vocab_size for checkpoint in (before, source or before))
        settings.cache.check(alpha=settings.alpha, gamma=settings.gamma, vocabulary=vocabulary)
        cache = open_teacher_cache(
            cache_folder or workdir / "teacher", teacher, *_teacher_rows(data, settings), settings=settings.cache, vocabulary=vocabulary,
            temperature=settings.temperature, context=context,
        )  # fmt: skip
    model = open_student(student, data.rows, context)
    layers: dict[int, int] = {}
    if source is not None and settings.gamma:
        layers = pair_layers(settings.feature_layers, before.num_layers, source.num_layers, _origins(before, source))
    live_teacher = load_model(teacher, device=context.device) if source and not cache else None
    objective = Objective(model, settings, teacher=live_teacher, cache=cache, layers=layers, seed=context.seed)
    origin = {"method": "distill", "student": file_digests(student), "teacher": file_digests(teacher) if source else None}
    metrics = train(objective, data, settings, TrainingRun("distil", origin, workdir), context=context)
    save_student(model, out, like=student)
    if cache is not None:
        metrics |= {"teacher_cache_mb": cache.nbytes / 1e6, "teacher_cache_built": float(cache.built)}
    return metrics


def _teacher_rows(data: TrainingRows, settings: DistillationSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all rows that the teacher reads, and their mask, padded to one length: padding after the last target decides nothing."""
    sets = [(data.rows, check_rows(data.rows, data.mask))]
    if data.validation and settings.evaluate_every:
        sets.append((data.validation[0], check_rows(*data.validation)))
    length = max(rows.shape[1] for rows, _ in sets)
    padded = [[functional.pad(tensor, (0, length - tensor.shape[1])) for tensor in pair] for pair in sets]
    return torch.cat([rows for rows, _ in padded]), torch.cat([targets for _, targets in padded])


def _origins(student: Checkpoint, teacher: Checkpoint) -> list[int] | None:
    """Return the teacher block that each block of the student was; None where it lost none, or they are not blocks of this teacher.

    Pruning records indices into the model that it started from. A teacher of the same architecture and width that has all of
    them counts as that model, or as another one that was pruned from it.
    """
    left, theirs = (read_kept(checkpoint.path).get(checkpoint.blocks) for checkpoint in (student, teacher))
    if left is None or (student.model_type, student.hidden_size) != (teacher.model_type, teacher.hidden_size):
        return None
    there = list(range(teacher.num_layers)) if theirs is None else theirs.tolist()
    return [there.index(block) for block in left.tolist()] if set(left.tolist()) <= set(there) else None
