"""The one training loop: Hugging Face's Trainer over fixed-length rows of tokens, quiet, and safe to kill at any step.

What is minimised is an `nn.Module`, the objective: `objective(input_ids, loss_mask, count)` gives a dict of scalar terms, of
which "loss" is differentiated. It holds the student and whatever else learns, so that all of it is in the checkpoints.
"""

import hashlib
import json
import random
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from compression.checkpoint import open_checkpoint
from compression.context import Context
from compression.errors import EdgepressError, Incompatible, UnusableData
from compression.loading import load_model, save_model
from compression.resumption import latest_checkpoint, write_checkpoint
from compression.training_settings import TrainingSettings

POINTS = 200  # of a loss curve, at most


def train(
    objective: nn.Module, rows: torch.Tensor, *, mask: torch.Tensor | None, settings: TrainingSettings, workdir: Path,
    context: Context, what: str,
) -> dict[str, float]:  # fmt: skip
    """Minimise `objective` in place; a second call with the same arguments after a kill continues from the last checkpoint.

    rows     int64 [n, length]: packed tokens. Batches are drawn from seeded permutations of them
    mask     bool [n, length], true where a token is a target (not prompt, not padding); None takes all
    workdir  holds the checkpoints; one training each. They stay: the caller removes them once the result is safe
    what     names the work to `context.progress`

    Returns the last point of the curve (means since the point before: every loss term, learning_rate, training_tokens_per_second), with
    steps, resumed_from_step, and seconds of this call. On a CPU the weights are bit-identical however often it was killed.
    Raises UnusableData (rows of another shape, nothing to learn from) and EdgepressError (the loss is no longer finite).
    """
    mask = check_rows(rows, mask)
    workdir.mkdir(parents=True, exist_ok=True)
    run = _fingerprint(objective, rows, mask, settings, context.seed)
    resume = latest_checkpoint(workdir, run=run, warn=context.warn)
    batches = _Batches(rows, mask, settings, context.seed)
    with seeded(context.seed):
        trainer = _StageTrainer(objective, batches, settings=settings, workdir=workdir, context=context, run=run, what=what)
        started = time.perf_counter()
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer.curve.last | {
        "steps": float(settings.steps),
        "resumed_from_step": float(resume.name.removeprefix("checkpoint-")) if resume else 0.0,
        "seconds": time.perf_counter() - started,
    }


def check_rows(rows: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The loss mask as bool [n, length]. Raises UnusableData where rows and mask cannot be trained on."""
    if rows.ndim != 2 or rows.dtype != torch.int64 or rows.shape[0] < 1 or rows.shape[1] < 2:
        raise UnusableData(
            f"training rows are {rows.dtype} {list(rows.shape)}; int64 [rows, length], two tokens or longer, is needed", key="data"
        )
    if mask is None:
        return torch.ones_like(rows, dtype=torch.bool)
    if mask.shape != rows.shape:
        raise UnusableData(f"the loss mask is {list(mask.shape)} and the training rows are {list(rows.shape)}; they must agree", key="data")
    if not mask[:, 1:].any():
        raise UnusableData("the loss mask leaves no token to learn from: every prompt fills its row; make the rows longer", key="data")
    return mask.bool()


def open_student(path: Path, rows: torch.Tensor, context: Context) -> PreTrainedModel:
    """The model to train, in float32 on the context's device.

    Raises Incompatible (a quantized or sparse checkpoint), UnusableData (tokens outside its vocabulary, rows longer than it reads).
    """
    checkpoint = open_checkpoint(path)
    if checkpoint.layout != "dense":
        raise Incompatible(f"{path} is quantized ({checkpoint.layout}) and cannot be trained; train before quantizing")
    if checkpoint.sparse:
        raise Incompatible(f"{path} is sparse (masks.safetensors), and training would fill its zeros; train before unstructured pruning")
    if rows.numel() and (int(rows.max()) >= checkpoint.vocab_size or int(rows.min()) < 0):
        raise UnusableData(
            f"training rows hold tokens {int(rows.min())}..{int(rows.max())}, {path} knows 0..{checkpoint.vocab_size - 1}; "
            "tokenize with the tokenizer of the model",
            key="data",
        )
    if rows.shape[-1] > checkpoint.max_length:
        raise UnusableData(f"training rows are {rows.shape[-1]} tokens long, {path} reads {checkpoint.max_length} at most", key="length")
    return load_model(path, device=context.device)


def save_student(model: PreTrainedModel, out: Path, *, like: Path) -> None:
    """Write the trained model in the dtype of `like`, with what a later stage needs to know of its pruning."""
    save_model(model, out, like=like)
    if (like / "kept.safetensors").is_file():
        shutil.copyfile(like / "kept.safetensors", out / "kept.safetensors")


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


class _Batches(Dataset):
    """Every row of the whole training in its order: permutation after permutation, as one epoch.

    One epoch has no remainder batch at its seams, and resuming is skipping the first k batches.
    """

    def __init__(self, rows: torch.Tensor, mask: torch.Tensor, settings: TrainingSettings, seed: int):
        self.rows, self.mask = rows, mask
        self.needed = settings.steps * settings.gradient_accumulation * settings.batch_size
        generator = torch.Generator().manual_seed(seed)
        rounds = -(-self.needed // len(rows))
        self.order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(rounds)])[: self.needed]

    def __len__(self) -> int:
        return self.needed

    def __getitems__(self, positions: list[int]) -> dict[str, torch.Tensor]:
        chosen = self.order[positions]
        return {"input_ids": self.rows[chosen], "loss_mask": self.mask[chosen]}


class _Curve:
    """Loss terms, averaged over the steps between two points. Part of the checkpoint, so that a kill leaves no dent in the curve."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor | float] = {}
        self.tokens = 0
        self.steps = 0
        self.seconds = 0.0
        self.last: dict[str, float] = {}

    def add(self, terms: Mapping[str, torch.Tensor]) -> None:
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach()

    def point(self, learning_rate: float) -> dict[str, float]:
        """Close the interval. Raises nothing: whether the loss is finite is the trainer's to judge."""
        self.last = {name: float(value) / self.steps for name, value in self.sums.items()}
        self.last |= {"learning_rate": learning_rate, "training_tokens_per_second": self.tokens / max(self.seconds, 1e-9)}
        self.sums, self.tokens, self.steps, self.seconds = {}, 0, 0, 0.0
        return self.last

    def save(self, file: Path) -> None:
        file.write_text(json.dumps(vars(self) | {"sums": {name: float(value) for name, value in self.sums.items()}}))

    def load(self, file: Path) -> None:
        vars(self).update(json.loads(file.read_text()))


class _StageTrainer(Trainer):
    loss_is_scaled_for_ga = True  # by the number of counted tokens in the whole accumulated batch, below

    def __init__(
        self, objective: nn.Module, batches: _Batches, *, settings: TrainingSettings, workdir: Path, context: Context, run: str, what: str
    ):  # fmt: skip
        self.curve = _Curve()
        self.objective: nn.Module = objective
        self.workdir: Path = workdir
        self.run: str = run
        super().__init__(
            model=objective,
            args=_arguments(settings, workdir, context),
            train_dataset=batches,
            data_collator=_as_is,
            callbacks=[_Reporter(self.curve, context, what)],
        )
        self.remove_callback(PrinterCallback)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        """Targets in one optimizer step: what every term of the loss is divided by. A position predicts the token after it."""
        return torch.stack([batch["loss_mask"][:, 1:].sum() for batch in batch_samples]).sum().clamp(min=1).to(device)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:  # fmt: skip
        terms = model(**inputs, count=num_items_in_batch)
        self.curve.add(terms)
        self.curve.tokens += inputs["input_ids"].numel()
        return terms["loss"]

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        write_checkpoint(self.workdir, self.state.global_step, self._fill, run=self.run)

    def _fill(self, directory: Path) -> None:
        torch.save(_trainable(self.objective), directory / "trainable.pt")
        self._save_optimizer_and_scheduler(str(directory))
        self._save_rng_state(str(directory))
        self.state.save_to_json(str(directory / "trainer_state.json"))
        self.curve.save(directory / "curve.json")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        saved = torch.load(Path(resume_from_checkpoint) / "trainable.pt", map_location=self.args.device, weights_only=True)
        with torch.no_grad():
            for name, parameter in _trainable(self.objective).items():
                parameter.copy_(saved[name])
        self.curve.load(Path(resume_from_checkpoint) / "curve.json")


class _Reporter(TrainerCallback):
    """Tells the context how far the training is and how it goes; stops it when the loss is no longer a number."""

    def __init__(self, curve: _Curve, context: Context, what: str):
        self.curve, self.context, self.what = curve, context, what
        self.learning_rate = 0.0
        self.since = 0.0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.since = time.perf_counter()

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        self.learning_rate = parts["optimizer"].param_groups[0]["lr"]  # the scheduler has moved on by the end of the step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        step, total = state.global_step, state.max_steps
        self.curve.steps += 1
        self.curve.seconds += time.perf_counter() - self.since
        self.context.progress(step, total, self.what)
        every = max(1, total // POINTS)
        if step % every and step != total and step % args.save_steps:
            return
        if not all(np.isfinite(float(value)) for value in self.curve.sums.values()):
            raise EdgepressError(
                f"{self.what}: the loss is no longer finite at step {step} of {total}; lower the learning rate", key="learning_rate"
            )
        if step % every == 0 or step == total:
            self.context.metrics(self.curve.point(self.learning_rate), step)


def _arguments(settings: TrainingSettings, workdir: Path, context: Context) -> TrainingArguments:
    device = torch.device(context.device)
    arguments = TrainingArguments(
        output_dir=str(workdir),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup_ratio,  # Trainer reads a number below 1 as a share
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.precision == "bfloat16",
        seed=context.seed % 2**32,
        use_cpu=device.type == "cpu",
        train_sampling_strategy="sequential",  # the order is in _Batches
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        save_strategy="steps",
        save_steps=settings.save_every,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
    )
    if arguments.device.type != device.type:
        raise Incompatible(
            f"the training was asked to run on {context.device}, and this machine trains on {arguments.device}", key="device"
        )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # or Trainer wraps the model into DataParallel where it sees several
    return arguments


def _as_is(batch: Any) -> Any:
    """`_Batches` gives whole batches."""
    return batch


def _trainable(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in module.named_parameters() if parameter.requires_grad}


def _fingerprint(objective: nn.Module, rows: torch.Tensor, mask: torch.Tensor, settings: TrainingSettings, seed: int) -> str:
    """What a checkpoint must agree with to be continued; `extra_repr` of the objective tells its weights and temperature."""
    digest = hashlib.sha256()
    shapes = {name: list(tensor.shape) for name, tensor in _trainable(objective).items()}
    digest.update(json.dumps([asdict(settings), seed, list(rows.shape), shapes, objective.extra_repr()]).encode())
    digest.update(rows.numpy().tobytes())
    digest.update(mask.numpy().tobytes())
    return digest.hexdigest()
