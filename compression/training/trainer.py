"""Hugging Face's Trainer, made quiet and safe to kill, over an objective that returns its loss in terms."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from compression.context import Context
from compression.errors import EdgepressError, Incompatible
from compression.resumption import write_checkpoint
from compression.training import processes
from compression.training.batches import Batches, used_lengths
from compression.training.curve import Curve
from compression.training.masks import FixedMasks
from compression.training.memory import BatchPlan, BatchTooLarge, is_out_of_memory
from compression.training.settings import TrainingSettings
from compression.training.validation import Validation

KEPT = "kept"  # below the work directory: the checkpoint of `keep_step`
POINTS = 200  # of a loss curve, at most
SECONDS_PER_TEXT = 1.0  # the progress bar's text reads the loss, which waits for the GPU


@dataclass(frozen=True)
class TrainingRun:
    """One training, which a second call with the same arguments resumes after a kill.

    Attributes:
        name: Names the work in progress, warnings and errors.
        origin: What the objective was made from, as JSON: the method's name and settings, `file_digests` of the models that it started from.
            A checkpoint of another origin is refused.
        workdir: Holds the checkpoints of this one training. They stay: the caller removes them once the result is safe.
        start: A folder with a kept checkpoint of the same training, from which it starts while `workdir` has none.
        keep_step: The step whose checkpoint is kept in `workdir/kept`.
    """

    name: str
    origin: Mapping[str, Any]
    workdir: Path
    start: Path | None = None
    keep_step: int | None = None


@dataclass(frozen=True)
class Checkpoints:
    """Where the checkpoints of `run` are written, under the `fingerprint` of all that decides its weights."""

    run: TrainingRun
    fingerprint: str


class StageTrainer(Trainer):
    """Hugging Face's Trainer over `Batches`: quiet, with our checkpoints, masks, early stopping and loss curve."""

    loss_is_scaled_for_ga = True  # by the number of counted tokens in the whole accumulated batch, below

    def __init__(
        self,
        objective: nn.Module,
        batches: Batches,
        settings: TrainingSettings,
        checkpoints: Checkpoints,
        *,
        plan: BatchPlan,
        masks: FixedMasks,
        validation: Validation | None,
        context: Context,
    ):
        self.curve = Curve()
        self.objective: nn.Module = objective
        self.masks: FixedMasks = masks
        self.validation: Validation | None = validation
        self.plan: BatchPlan = plan
        self.checkpoints: Checkpoints = checkpoints
        super().__init__(
            model=objective,
            args=_arguments(settings, checkpoints.run.workdir, context),
            train_dataset=batches,
            data_collator=_as_is,
            callbacks=[_Steps(self, settings, context)],
        )
        self.remove_callback(PrinterCallback)

    def run_from(self, checkpoint: Path | None) -> dict[str, float]:
        """Train to the end, from `checkpoint` where there is one. Returns the last point of the curve, and steps."""
        steps = step_of(checkpoint) if checkpoint else 0
        if checkpoint:
            self._load_from_checkpoint(str(checkpoint))
        if not (self.validation and self.validation.state.stopped):
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            steps = self.state.global_step
        if self.validation:
            self.restore(self.validation.best)
        self._unwrap()
        return self.curve.last | {"steps": float(steps)}

    def set_back(self, plan: BatchPlan) -> Path:
        """Write a checkpoint of the complete steps after BatchTooLarge, to be resumed in batches of another size."""
        self.plan = plan
        self.objective.zero_grad(set_to_none=True)
        self.write(self.checkpoints.run.workdir)
        self._unwrap()
        return self.checkpoints.run.workdir / f"checkpoint-{self.state.global_step}"

    def _unwrap(self) -> None:
        """Take accelerate's autocast off the objective's forward."""
        self.accelerator.unwrap_model(self.model_wrapped, keep_fp32_wrapper=False)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        """Count the targets of one optimizer step, which every term of the loss is divided by. A position predicts the token after it."""
        counted = torch.stack([batch["loss_mask"][:, 1:].sum() for batch in batch_samples]).sum().to(device)
        return processes.summed(counted).clamp(min=1)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
        """Raise BatchTooLarge where memory ran out and smaller batches can help: the weights are those of the step before."""
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        except RuntimeError as error:
            if not is_out_of_memory(error) or self.args.per_device_train_batch_size == 1 or processes.count() > 1:
                raise
        raise BatchTooLarge  # outside the handler, so that the traceback above and the activations it refers to are freed

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:  # fmt: skip
        terms = model(**inputs, count=num_items_in_batch)
        self.curve.add(terms, used_lengths(inputs["loss_mask"]).sum())  # padding is not counted
        return terms["loss"] * processes.count()  # gradients are averaged over processes, and the count is that of all

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        self.masks.mask_gradients(self.state.global_step + 1)
        return super()._clip_grad_norm(model)

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        self.write(self.checkpoints.run.workdir)

    def write(self, workdir: Path) -> None:
        """Write a checkpoint of the steps done so far."""
        states = processes.gathered(self._random_state())
        if processes.is_first():
            write_checkpoint(
                workdir, self.state.global_step, lambda directory: self._fill(directory, states), run=self.checkpoints.fingerprint
            )
        processes.wait()

    def _random_state(self) -> tuple[str, bytes]:
        """Return name and content of the file in which Trainer finds this process's random state again."""
        with TemporaryDirectory() as folder:
            self._save_rng_state(folder)
            (file,) = Path(folder).iterdir()
            return file.name, file.read_bytes()

    def _fill(self, directory: Path, random_states: list[tuple[str, bytes]]) -> None:
        torch.save(self.snapshot(), directory / "trainable.pt")
        self._save_optimizer_and_scheduler(str(directory))
        self._save_scaler(str(directory))
        for name, content in random_states:
            (directory / name).write_bytes(content)
        self.state.save_to_json(str(directory / "trainer_state.json"))
        self.curve.save(directory / "curve.json")
        self.plan.save(directory)
        if self.validation:
            self.validation.save(directory)

    def snapshot(self) -> dict[str, dict[str, torch.Tensor]]:
        """Copy weights and masks as they stand, on the CPU."""
        weights = {name: weight.to("cpu", copy=True) for name, weight in trainable(self.objective).items()}
        return {"weights": weights, "masks": self.masks.state()}

    @torch.no_grad()
    def restore(self, snapshot: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        for name, parameter in trainable(self.objective).items():
            parameter.copy_(snapshot["weights"][name])
        self.masks.load(snapshot["masks"])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        checkpoint = Path(resume_from_checkpoint)
        self.restore(torch.load(checkpoint / "trainable.pt", map_location="cpu", weights_only=True))
        self.curve.load(checkpoint / "curve.json")
        if self.validation and checkpoint.parent == self.checkpoints.run.workdir:  # the best weights of another training are not this one's
            self.validation.load(checkpoint)


class _Steps(TrainerCallback):
    """Acts around each optimizer step, and reports progress and loss to the context."""

    def __init__(self, trainer: StageTrainer, settings: TrainingSettings, context: Context):
        self.trainer, self.settings, self.context, self.run = trainer, settings, context, trainer.checkpoints.run
        self.learning_rate = 0.0
        self.step_started = self.reported = 0.0
        self.saved = time.monotonic()
        self.text = self.run.name

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        self.trainer.masks.start(parts["optimizer"])

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.step_started = time.perf_counter()

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        self.trainer.masks.before_step(state.global_step + 1, parts["optimizer"])

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        self.trainer.masks.after_step()
        self.learning_rate = parts["optimizer"].param_groups[0]["lr"]  # the scheduler has moved on by the end of the step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        step, total, curve, validation = state.global_step, state.max_steps, self.trainer.curve, self.trainer.validation
        loss = curve.end_step(time.perf_counter() - self.step_started)
        self._report(step, total, loss)
        if validation and validation.due(step):
            losses = validation.losses(self.trainer.objective, args.device)
            self.context.metrics(losses, step)
            validation.judge(losses, step, self.trainer.snapshot)
            if validation.state.stopped:
                control.should_training_stop = control.should_save = True
        minutes = processes.agreed((time.monotonic() - self.saved) / 60) if self.settings.save_minutes else 0.0
        if self.settings.save_minutes and minutes >= self.settings.save_minutes:
            control.should_save = True
        if control.should_save:
            self.saved = time.monotonic()
        point = step % max(1, total // POINTS) == 0 or control.should_training_stop
        if point or control.should_save or step == self.run.keep_step:
            self._check_finite(step, total)
        if point:
            self.context.metrics(curve.point(self.learning_rate), step)
        if step == self.run.keep_step:
            self.trainer.write(self.run.workdir / KEPT)

    def _report(self, step: int, total: int, loss: torch.Tensor) -> None:
        if step == total or time.monotonic() - self.reported >= SECONDS_PER_TEXT:
            self.reported = time.monotonic()
            self.text = f"{self.run.name}: loss {float(loss):.4g}, {self.trainer.curve.tokens_per_second:,.0f} tokens/s"
        self.context.progress(step, total, self.text)

    def _check_finite(self, step: int, total: int) -> None:
        if not all(math.isfinite(value) for value in self.trainer.curve.sums.values()):
            raise EdgepressError(
                f"{self.run.name}: the loss is no longer finite at step {step} of {total}; lower the learning rate", key="learning_rate"
            )


def _arguments(settings: TrainingSettings, workdir: Path, context: Context) -> TrainingArguments:
    device = torch.device(context.device)
    _check_precision(settings, device)
    arguments = TrainingArguments(
        output_dir=str(workdir),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant_with_warmup" if settings.schedule == "constant" else settings.schedule,
        warmup_steps=settings.warmup_ratio,  # Trainer reads a number below 1 as a share
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm or math.inf,  # at 0 Trainer would not come by `_clip_grad_norm`
        bf16=settings.precision == "bfloat16",
        fp16=settings.precision == "float16",
        seed=context.seed % 2**32,
        use_cpu=device.type == "cpu",
        ddp_find_unused_parameters=not settings.gradient_checkpointing,  # a loss on a block leaves those above it without gradient
        train_sampling_strategy="sequential",  # the order is in `Batches`
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
        raise Incompatible(f"training needs {context.device}, and transformers trains on {arguments.device} on this machine", key="device")
    arguments._n_gpu = min(arguments.n_gpu, 1)  # or Trainer wraps the model into DataParallel where it sees several
    return arguments


def _check_precision(settings: TrainingSettings, device: torch.device) -> None:
    if settings.precision == "float16" and device.type != "cuda":
        raise Incompatible(f"precision float16 needs a GPU with CUDA, and the device is {device.type}; take bfloat16", key="precision")
    if settings.precision == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise Incompatible(f"{torch.cuda.get_device_name(device)} does not multiply in bfloat16; take float16", key="precision")


def checkpoint_activations(objective: nn.Module) -> None:
    """Make the models that learn keep only the activations between their blocks."""
    for part in objective.modules():
        if isinstance(part, PreTrainedModel) and part.supports_gradient_checkpointing and not part.is_gradient_checkpointing:
            part.gradient_checkpointing_enable({"use_reentrant": False})


def step_of(checkpoint: Path) -> int:
    """Return the number of steps in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def trainable(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters that learn, by name."""
    return {name: parameter.detach() for name, parameter in module.named_parameters() if parameter.requires_grad}


def _as_is(batch: Any) -> Any:
    """Collate nothing: `Batches` returns whole batches."""
    return batch
