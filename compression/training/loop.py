"""The one training loop: Hugging Face's Trainer over rows of tokens, quiet, and safe to kill at any step.

It minimises an `nn.Module`, the objective: `objective(input_ids, loss_mask, count)` returns a dict of scalar terms, of which "loss" is
differentiated. The objective holds the student and everything else that learns, so that all of it is in the checkpoints.
"""

import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from compression.context import Context
from compression.errors import EdgepressError
from compression.resumption import fingerprint, latest_checkpoint
from compression.training import processes
from compression.training.batches import Batches, TrainingRows, check_rows
from compression.training.masks import FixedMasks
from compression.training.memory import BatchPlan, BatchTooLarge, free_memory
from compression.training.settings import TrainingSettings
from compression.training.trainer import Checkpoints, StageTrainer, TrainingRun, checkpoint_activations, step_of, trainable
from compression.training.validation import Validation


def train(
    objective: nn.Module,
    data: TrainingRows,
    settings: TrainingSettings,
    run: TrainingRun,
    *,
    context: Context,
    masks: FixedMasks | None = None,
) -> dict[str, float]:
    """Minimise `objective` in place; a second call with the same arguments after a kill resumes from the last checkpoint.

    On a CPU the weights are bit-identical however often it was killed, except where memory ran out: that step is then repeated in
    batches of half the size, as many rows in all, and all steps after it use that size.

    Args:
        objective: The module described above; its trainable parameters change.
        data: Rows, from seeded permutations of which batches are drawn, and validation rows.
        settings: May be of a subclass: only the fields of `TrainingSettings` are read.
        run: Name, origin and work directory of the training.
        context: Device, seed and callbacks.
        masks: What happens to weights with masks (`attach_masks`); by default the masks stay as they are.

    Returns:
        The last point of the curve (means since the point before: every loss term, learning_rate, training_tokens_per_second), with
        steps, resumed_from_step, batch_size and oom_retries, seconds of this call; with validation also validation_loss, best_step and
        stopped_early.

    Raises:
        UnusableData: Rows have another shape, or nothing to learn from.
        Incompatible: This machine lacks the device or the precision.
        EdgepressError: The loss is no longer finite, or `workdir` belongs to another training.
    """
    mask = check_rows(data.rows, data.mask)
    validation = Validation(data.validation, settings) if data.validation and settings.evaluate_every else None
    masks = masks or FixedMasks(objective)
    if settings.gradient_checkpointing:
        checkpoint_activations(objective)
    batches = Batches(data.rows, mask, settings, context.seed, processes.count())
    tensors = [data.rows, mask, *((validation.rows, validation.mask) if validation else ())]
    checkpoints = Checkpoints(run, _fingerprint(objective, tensors, settings, run.origin, context))
    resumed_from = checkpoint = _latest(run, checkpoints.fingerprint, context)
    plan = BatchPlan.load(checkpoint) if checkpoint else BatchPlan(settings.batch_size)
    started = time.perf_counter()
    with seeded(context.seed + processes.rank()):
        while True:
            trainer = StageTrainer(
                objective, batches, settings.of_batch_size(plan.batch_size), checkpoints, plan=plan, masks=masks, validation=validation,
                context=context,
            )  # fmt: skip
            try:
                curve = trainer.run_from(checkpoint)
                break
            except BatchTooLarge:
                plan = plan.halved()
            context.warn(
                f"{run.name}: memory ran out at batch_size {trainer.plan.batch_size}; it continues with batches of {plan.batch_size} and "
                "as many rows a step. Its weights may differ in their last bits from those of a machine with more memory"
            )
            checkpoint = trainer.set_back(plan)
            del trainer
            free_memory()
    return curve | (validation.metrics() if validation else {}) | {
        "resumed_from_step": float(step_of(resumed_from)) if resumed_from else 0.0,
        "batch_size": float(plan.batch_size),
        "oom_retries": float(plan.oom_retries),
        "seconds": time.perf_counter() - started,
    }  # fmt: skip


def _latest(run: TrainingRun, fingerprint: str, context: Context) -> Path | None:
    """Find the checkpoint to resume from, in the first process only: finding it also removes incomplete ones."""
    found = None
    if processes.is_first():
        run.workdir.mkdir(parents=True, exist_ok=True)
        found = latest_checkpoint(run.workdir, run=fingerprint, warn=context.warn)
        if found is None and run.start is not None:
            found = latest_checkpoint(run.start, run=fingerprint, warn=context.warn)
            if found is None:
                raise EdgepressError(f"{run.start} holds no complete checkpoint to start from")
    return processes.agreed(found)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed Python's, numpy's and torch's generators inside the block, and restore their states after it."""
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def _fingerprint(
    objective: nn.Module,
    data: list[torch.Tensor],
    settings: TrainingSettings,
    origin: Mapping[str, Any],
    context: Context,
) -> str:
    """Digest what a checkpoint must agree with to be resumed; `extra_repr` of the objective describes its loss."""
    document = {
        "origin": dict(origin), "settings": settings.training_values(), "objective": objective.extra_repr(), "seed": context.seed,
        "trainable": {name: list(tensor.shape) for name, tensor in trainable(objective).items()},
        "data": [list(tensor.shape) for tensor in data], "device": torch.device(context.device).type, "processes": processes.count(),
    }  # fmt: skip
    return fingerprint(document, *(tensor.numpy().tobytes() for tensor in data))
