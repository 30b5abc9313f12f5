"""The one training loop: Hugging Face's Trainer over rows of tokens, quiet, and safe to kill at any step.

What is minimised is an `nn.Module`, the objective: `objective(input_ids, loss_mask, count)` gives a dict of scalar terms, of
which "loss" is differentiated. It holds the student and whatever else learns, so that all of it is in the checkpoints.
"""

import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from compression.context import Context
from compression.errors import EdgepressError
from compression.resumption import fingerprint, latest_checkpoint
from compression.training import processes
from compression.training.batches import Batches, check_rows
from compression.training.held_masks import HeldMasks
from compression.training.memory import BatchPlan, BatchTooLarge, free_memory
from compression.training.settings import TrainingSettings
from compression.training.trainer import StageTrainer, checkpoint_activations, step_of, trainable
from compression.training.validation import HeldOut, Validation


def train(
    objective: nn.Module, rows: torch.Tensor, *, mask: torch.Tensor | None, settings: TrainingSettings, origin: Mapping[str, Any],
    workdir: Path, context: Context, what: str, validation: HeldOut | None = None, sparsity: HeldMasks | None = None, start: Path | None = None,
    keep_step: int | None = None,
) -> dict[str, float]:  # fmt: skip
    """Minimise `objective` in place; a second call with the same arguments after a kill continues from the last checkpoint.

    rows        int64 [n, length]: packed tokens. Batches are drawn from seeded permutations of them
    mask        bool [n, length], true where a token is a target (not prompt, not padding); None takes all
    origin      what the objective was made of, as JSON: the method's name and settings, `file_digests` of the models that it started from.
                A checkpoint in `workdir` of another origin is not continued
    workdir     holds the checkpoints; one training each. They stay: the caller removes them once the result is safe
    what        names the work to `context.progress`
    validation  further rows and their mask, on which every `settings.evaluate_every` steps the loss is taken; the objective ends with
                the weights of the lowest. Read when that is set
    sparsity    what becomes of weights that carry masks (`hold_masks`); by default they stay as sparse as they are
    start       directory of a checkpoint of this training that was kept, from which it begins when it has none of its own
    keep_step   the step whose checkpoint is kept in `workdir/kept`

    Returns the last point of the curve (means since the point before: every loss term, learning_rate, training_tokens_per_second), with
    steps, resumed_from_step, batch_size and oom_retries, seconds of this call; with validation also validation_loss, best_step and
    stopped_early. On a CPU the weights are bit-identical however often it was killed, except where memory ran out: then the step is
    tried again in batches of half the size, as many rows in all, and so are all that follow.
    Raises UnusableData (rows of another shape, nothing to learn from), Incompatible (device or precision that this machine does not
    have) and EdgepressError (the loss is no longer finite, a work directory of another training).
    """
    mask = check_rows(rows, mask)
    judge = Validation(validation, settings) if validation and settings.evaluate_every else None
    sparsity = sparsity or HeldMasks(objective)
    if settings.gradient_checkpointing:
        checkpoint_activations(objective)
    run = _fingerprint(objective, rows, mask, judge, settings, origin, context)
    batches = Batches(rows, mask, settings, context.seed, processes.count())
    first = resume = _latest(workdir, start, run, context)
    fit = BatchPlan.load(resume) if resume else BatchPlan(settings.batch_size)
    began = time.perf_counter()
    with seeded(context.seed + processes.rank()):
        while True:
            trainer = StageTrainer(
                objective, batches, settings=settings.of_batch_size(fit.batch_size), fit=fit, sparsity=sparsity, validation=judge,
                workdir=workdir, context=context, run=run, what=what, keep_step=keep_step,
            )  # fmt: skip
            try:
                curve = trainer.run_from(resume)
                break
            except BatchTooLarge:
                fit = fit.halved()
            context.warn(
                f"{what}: memory ran out at batch_size {trainer.fit.batch_size}; it goes on with batches of {fit.batch_size} and as many "
                "rows a step. Its weights may differ in their last bits from those of a machine with more memory"
            )
            resume = trainer.set_back(fit)
            del trainer
            free_memory()
    return curve | (judge.figures() if judge else {}) | {
        "resumed_from_step": float(step_of(first)) if first else 0.0,
        "batch_size": float(fit.batch_size),
        "oom_retries": float(fit.oom_retries),
        "seconds": time.perf_counter() - began,
    }  # fmt: skip


def _latest(workdir: Path, start: Path | None, run: str, context: Context) -> Path | None:
    """The checkpoint to go on from. One process looks, since looking clears away what is incomplete."""
    found = None
    if processes.is_first():
        workdir.mkdir(parents=True, exist_ok=True)
        found = latest_checkpoint(workdir, run=run, warn=context.warn)
        if found is None and start is not None:
            found = latest_checkpoint(start, run=run, warn=context.warn)
            if found is None:
                raise EdgepressError(f"{start} holds no complete checkpoint to start from")
    return processes.agreed(found)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's, numpy's and torch's generators start from `seed` inside, and go on as if nothing had happened after."""
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
    objective: nn.Module, rows: torch.Tensor, mask: torch.Tensor, judge: Validation | None, settings: TrainingSettings,
    origin: Mapping[str, Any], context: Context,
) -> str:  # fmt: skip
    """What a checkpoint must agree with to be continued; `extra_repr` of the objective tells its weights and temperature."""
    data = [rows, mask, *((judge.rows, judge.mask) if judge else ())]
    document = {
        "origin": dict(origin), "settings": asdict(settings), "objective": objective.extra_repr(), "seed": context.seed,
        "trainable": {name: list(tensor.shape) for name, tensor in trainable(objective).items()},
        "data": [list(tensor.shape) for tensor in data], "device": torch.device(context.device).type, "processes": processes.count(),
    }  # fmt: skip
    return fingerprint(document, *(tensor.numpy().tobytes() for tensor in data))
