"""Distillation: bring a compressed student back towards its teacher."""

from pathlib import Path

import torch

from compression.checkpoint import open_checkpoint
from compression.context import Context
from compression.distillation.compatibility import FeatureLayers, check_vocabularies, pair_layers
from compression.distillation.objective import Objective
from compression.loading import load_model
from compression.training import open_student, save_student, train
from compression.training_settings import TrainingSettings


def distill(
    student: Path, teacher: Path, out: Path, rows: torch.Tensor, *, mask: torch.Tensor | None = None, alpha: float = 1.0, beta: float = 0.0,
    gamma: float = 0.0, temperature: float = 2.0, feature_layers: FeatureLayers = "middle", settings: TrainingSettings, workdir: Path,
    context: Context,
) -> dict[str, float]:  # fmt: skip
    """Minimise α·τ²·KL(teacher ‖ student) + β·cross-entropy + γ·hidden-state MSE, and write the student to `out` in its own dtype.

    β = 0 needs no labels (self-distillation, L2PSD of arXiv 2505.18166); α = γ = 0 is fine-tuning, and the teacher is not loaded.

    rows, mask      int64 and bool [n, length]: packed tokens, true where a token is a target; None takes all
    feature_layers  "last", "middle", "uniform", or student block -> teacher block, read when γ > 0

    Returns the metrics of `compression.training.train`: loss, loss_kd, loss_task, loss_feature (those with a weight), ...
    Raises Incompatible (another vocabulary, a sparse or quantized student), UnusableModel, UnusableData, EdgepressError.
    """
    taught = bool(alpha or gamma)
    if taught:
        check_vocabularies(open_checkpoint(student), open_checkpoint(teacher))
    model = open_student(student, rows, context)
    guide = load_model(teacher, device=context.device) if taught else None
    depths = [network.config.num_hidden_layers for network in (model, guide or model)]
    layers = pair_layers(feature_layers, *depths) if gamma else {}
    objective = Objective(
        model, teacher=guide, alpha=alpha, beta=beta, gamma=gamma, temperature=temperature, layers=layers, seed=context.seed
    )
    metrics = train(objective, rows, mask=mask, settings=settings, workdir=workdir, context=context, what="distil")
    save_student(model, out, like=student)
    return metrics
