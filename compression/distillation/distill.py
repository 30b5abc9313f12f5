"""Distillation: bring a compressed student back towards its teacher."""

from pathlib import Path

import torch
from torch.nn import functional

from compression.checkpoints.checkpoint import Checkpoint, file_digests, open_checkpoint
from compression.checkpoints.kept import read_kept
from compression.checkpoints.loading import load_model
from compression.context import Context
from compression.distillation.compatibility import (
    CacheSettings,
    Divergence,
    Feature,
    FeatureLayers,
    check_length,
    check_vocabularies,
    pair_layers,
)  # fmt: skip
from compression.distillation.objective import Objective
from compression.distillation.teacher_cache import TeacherCache, open_teacher_cache
from compression.training.batches import check_rows
from compression.training.loop import train
from compression.training.settings import TrainingSettings
from compression.training.students import check_student, open_student, save_student
from compression.training.validation import HeldOut


def distill(
    student: Path, teacher: Path, out: Path, rows: torch.Tensor, *, mask: torch.Tensor | None = None, validation: HeldOut | None = None,
    alpha: float = 1.0, beta: float = 0.0, gamma: float = 0.0, temperature: float = 2.0, divergence: Divergence = "forward",
    jsd_beta: float = 0.5, feature: Feature = "hidden_mse", feature_layers: FeatureLayers = "middle",
    teacher_cache: CacheSettings | None = None, cache: Path | None = None, settings: TrainingSettings, workdir: Path, context: Context,
) -> dict[str, float]:  # fmt: skip
    """Minimise α·L_KD + β·cross-entropy + γ·L_feature (`losses`), and write the student to `out` in its own dtype.

    β = 0 needs no labels (self-distillation, L2PSD of arXiv 2505.18166); α = γ = 0 is fine-tuning, and the teacher is not loaded.

    rows, mask      int64 and bool [n, length]: packed tokens, true where a token is a target; None takes all
    validation      further ones, for early stopping on the same loss
    divergence      forward, reverse or js, with its `jsd_beta` (`losses.kd_loss`)
    feature         hidden_mse, hidden_cosine, attention or gradient (`features.look`), read when γ > 0
    feature_layers  "last", "middle", "uniform", or student block -> teacher block
    teacher_cache   keep the teacher's outputs in the directory `cache` (default: in `workdir`), for every training that asks the same.
                    The teacher then runs in batches of its own, so a last bit may differ from a training without; between two
                    trainings with the cache, whoever made it, none does

    Returns the metrics of `compression.training.train`: loss, loss_kd, loss_task, loss_feature (those with a weight), ...; with a cache
    teacher_cache_mb and teacher_cache_built (1: by this call).
    Raises Incompatible (another vocabulary, a quantized student, a cache that cannot hold what is asked), UnusableModel, UnusableData,
    EdgepressError.
    """
    pupil = open_checkpoint(student)
    guide = open_checkpoint(teacher) if alpha or gamma else None
    check_student(pupil, rows)
    if guide is not None:
        check_vocabularies(pupil, guide)
        check_length(guide, rows.shape[1])
    said: TeacherCache | None = None
    if teacher_cache is not None:
        vocabulary = min(checkpoint.vocab_size for checkpoint in (pupil, guide or pupil))
        teacher_cache.check(alpha=alpha, gamma=gamma, vocabulary=vocabulary)
        said = open_teacher_cache(
            cache or workdir / "teacher", teacher, *_asked(rows, mask, validation if settings.evaluate_every else None),
            settings=teacher_cache, vocabulary=vocabulary, temperature=temperature, context=context,
        )  # fmt: skip
    model = open_student(student, rows, context)
    layers = pair_layers(feature_layers, pupil.num_layers, guide.num_layers, _origins(pupil, guide)) if guide and gamma else {}
    objective = Objective(
        model, teacher=load_model(teacher, device=context.device) if guide and not said else None, cache=said, alpha=alpha, beta=beta,
        gamma=gamma, temperature=temperature, divergence=divergence, jsd_beta=jsd_beta, feature=feature, layers=layers, seed=context.seed,
    )  # fmt: skip
    origin = {"method": "distill", "student": file_digests(student), "teacher": file_digests(teacher) if guide else None}
    metrics = train(
        objective, rows, mask=mask, settings=settings, origin=origin, workdir=workdir, context=context, what="distil", validation=validation
    )
    save_student(model, out, like=student)
    if said is not None:
        metrics |= {"teacher_cache_mb": said.nbytes / 1e6, "teacher_cache_built": float(said.built)}
    return metrics


def _asked(rows: torch.Tensor, mask: torch.Tensor | None, validation: HeldOut | None) -> tuple[torch.Tensor, torch.Tensor]:
    """All rows that the teacher is asked about, and their mask: padded behind to one length, which decides nothing."""
    sets = [(rows, check_rows(rows, mask)), *([(validation[0], check_rows(*validation))] if validation else [])]
    length = max(some.shape[1] for some, _ in sets)
    padded = [[functional.pad(tensor, (0, length - tensor.shape[1])) for tensor in pair] for pair in sets]
    return torch.cat([some for some, _ in padded]), torch.cat([targets for _, targets in padded])


def _origins(student: Checkpoint, teacher: Checkpoint) -> list[int] | None:
    """The teacher block that each block of the student was; None where it lost none, or its blocks are none of this teacher's.

    Pruning writes down indices into the model that it started from. A teacher of the same architecture and width that has all of
    them is taken for that model, or for another one that was pruned from it.
    """
    left, theirs = (read_kept(checkpoint.path).get(checkpoint.blocks) for checkpoint in (student, teacher))
    if left is None or (student.model_type, student.hidden_size) != (teacher.model_type, teacher.hidden_size):
        return None
    there = list(range(teacher.num_layers)) if theirs is None else theirs.tolist()
    return [there.index(block) for block in left.tolist()] if set(left.tolist()) <= set(there) else None
