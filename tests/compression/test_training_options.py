"""What a training may be asked for beyond its steps: early stopping, schedules, batches of like length, less memory."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from compression.checkpoints.loading import load_model
from compression.context import Context
from compression.errors import Incompatible
from compression.training import TrainingSettings
from compression.training.batches import Batches, batch_of
from tests.compression.test_training import Toy, dying, some_mask, weights
from tests.tiny import tiny_windows
from tests.trainings import build_objective, run_training

SETTINGS = TrainingSettings(steps=12, batch_size=4, learning_rate=3e-2, save_every=5, evaluate_every=2, group_by_length=False)
HELD_OUT = (tiny_windows(5, seed=1), torch.arange(32)[None].expand(5, -1) > torch.arange(5)[:, None] * 6)


def run(
    model: nn.Module, workdir: Path, *, settings: TrainingSettings = SETTINGS, mask: torch.Tensor | None = None, **context: object
) -> dict[str, float]:
    return run_training(
        model, tiny_windows(11), mask=mask, settings=settings, origin={}, workdir=workdir, context=Context(seed=5, **context), name="toy",
        validation=HELD_OUT,
    )  # fmt: skip


def held_out_loss(model: Toy) -> float:
    """The mean over all targets, in one piece and in float64."""
    model = model.double().eval()
    rows, mask = HELD_OUT
    with torch.no_grad():
        return float(model(rows, mask, mask[:, 1:].sum().double())["loss"])


def test_the_weights_of_the_lowest_validation_loss_are_what_is_left(tmp_path: Path) -> None:
    """On rows that have nothing to do with each other, learning one set soon makes the other worse."""
    model, curve, at = Toy(), {}, {}
    met: dict[str, Callable[..., None]] = {
        "metrics": lambda values, step: curve.update({step: values["validation_loss"]}) if "validation_loss" in values else None,
        "progress": lambda step, total, what: at.update({step: [w.detach().clone() for w in model.parameters()]}),
    }
    metrics = run(model, tmp_path, **met)
    assert list(curve) == [2, 4, 6, 8, 10, 12]
    for step, loss in curve.items():
        replayed = Toy()
        for weight, then in zip(replayed.parameters(), at[step], strict=True):
            weight.data.copy_(then)
        assert held_out_loss(replayed) == pytest.approx(loss, rel=1e-5)
    best = min(curve, key=lambda step: curve[step])
    assert best < 12
    assert (metrics["best_step"], metrics["validation_loss"], metrics["stopped_early"]) == (best, curve[best], 0)
    assert all(torch.equal(weight, then) for weight, then in zip(model.parameters(), at[best], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("died_at", [3, 7, 8, 11])
def test_early_stopping_survives_kills_bit_for_bit(tmp_path: Path, died_at: int) -> None:
    settings = SETTINGS.model_copy(update={"steps": 40, "patience": 3})
    whole, killed = Toy(dropout=0.3), Toy(dropout=0.3)
    metrics = run(whole, tmp_path / "whole", settings=settings)
    assert metrics["stopped_early"] == 1
    assert metrics["steps"] == metrics["best_step"] + 6 < 40
    with pytest.raises(InterruptedError):
        run(Toy(dropout=0.3), tmp_path / "killed", settings=settings, progress=dying(died_at))
    again = run(killed, tmp_path / "killed", settings=settings)
    assert torch.equal(weights(whole), weights(killed))
    assert {name: metrics[name] for name in ("steps", "best_step", "validation_loss", "loss")} == {
        name: again[name] for name in ("steps", "best_step", "validation_loss", "loss")
    }
    finished = Toy()
    assert run(finished, tmp_path / "killed", settings=settings)["steps"] == metrics["steps"]  # and is not taken up again
    assert torch.equal(weights(whole), weights(finished))


def test_evaluating_changes_nothing_of_the_training(tmp_path: Path) -> None:
    seen: dict[int, list[torch.Tensor]] = {}
    for evaluate_every in (0, 1):
        model = Toy(dropout=0.3)
        finals: list[torch.Tensor] = []
        run(
            model, tmp_path / str(evaluate_every), settings=SETTINGS.model_copy(update={"evaluate_every": evaluate_every}),
            progress=lambda *_, model=model, finals=finals: finals.append(weights(model).clone()),
        )  # fmt: skip
        seen[evaluate_every] = finals
    assert all(torch.equal(a, b) for a, b in zip(seen[0], seen[1], strict=True))


def test_patience_without_evaluations_is_refused() -> None:
    with pytest.raises(ValidationError, match="evaluate_every") as caught:
        TrainingSettings(patience=2)
    assert caught.value.errors()[0]["loc"] == ("patience",)


@pytest.mark.parametrize(
    ("schedule", "after"),
    [("cosine", lambda x: 0.5 * (1 + math.cos(math.pi * x))), ("linear", lambda x: 1 - x), ("constant", lambda x: 1.0)],
)
def test_schedules_by_their_formulas(tmp_path: Path, schedule: str, after: Callable[[float], float]) -> None:
    rates: dict[int, float] = {}
    settings = SETTINGS.model_copy(update={"schedule": schedule, "warmup_ratio": 0.25, "evaluate_every": 0})
    run(Toy(), tmp_path, settings=settings, metrics=lambda values, step: rates.update({step: values["learning_rate"]}))
    for step, rate in rates.items():
        done = step - 1
        assert rate == pytest.approx(3e-2 * (done / 3 if done < 3 else after((done - 3) / 9)))


@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=60), batch_size=st.integers(1, 5), accumulation=st.integers(1, 3),
    seed=st.integers(0, 9), processes=st.integers(1, 2),
)  # fmt: skip
def test_batches_of_like_length_hold_the_same_rows_with_less_padding(
    lengths: list[int], batch_size: int, accumulation: int, seed: int, processes: int
) -> None:
    mask = torch.arange(40)[None] < torch.tensor(lengths)[:, None]
    rows = torch.arange(len(lengths))[:, None].expand(-1, 40).contiguous()
    per_step = batch_size * accumulation * processes
    settings = TrainingSettings(steps=-(-len(lengths) // per_step) * 2, batch_size=batch_size, gradient_accumulation=accumulation)
    plain, grouped = (
        Batches(rows, mask, settings.model_copy(update={"group_by_length": group}), seed, processes) for group in (False, True)
    )
    assert sorted(plain.order.tolist()) == sorted(grouped.order.tolist())
    widths = [
        [b.__getitems__(part.tolist())["input_ids"].shape[1] for part in torch.arange(len(b)).split(batch_size)] for b in (plain, grouped)
    ]
    assert sum(widths[1]) <= sum(widths[0]) or len(lengths) < 2 * per_step
    again = Batches(rows, mask, settings.model_copy(update={"group_by_length": True}), seed, processes)
    assert torch.equal(again.order, grouped.order)


def test_sorting_by_length_saves_most_of_the_padding() -> None:
    lengths = torch.randint(4, 200, (400,), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(200)[None] < lengths[:, None]
    computed = {}
    for group in (False, True):
        batches = Batches(
            torch.zeros(400, 200, dtype=torch.int64), mask, TrainingSettings(steps=50, batch_size=8, group_by_length=group), 0
        )
        computed[group] = sum(batches.__getitems__(part.tolist())["input_ids"].numel() for part in torch.arange(400).split(8))
    assert computed[True] < 1.1 * int(lengths.sum()) < 1.5 * int(lengths.sum()) < computed[False]


def test_what_follows_the_last_target_decides_nothing(checkpoint: Path) -> None:
    """A batch is cut behind it; the loss of a causal model is the same, whatever stood there."""
    rows, mask = tiny_windows(3), torch.arange(32)[None] < torch.tensor([[9], [20], [14]])
    cut = batch_of(rows, mask, torch.arange(3))
    assert cut["input_ids"].shape == (3, 20)
    objective = build_objective(load_model(checkpoint), beta=1.0)
    with torch.no_grad():
        torch.testing.assert_close(objective(**cut)["loss"], objective(rows, mask)["loss"])


def test_gradient_checkpointing_keeps_less_and_ends_in_the_same_weights(tmp_path: Path, checkpoint: Path) -> None:
    found = {}
    for used in (False, True):
        model = load_model(checkpoint)
        runs = {"layers": 0}
        model.model.layers[0].self_attn.register_forward_hook(lambda *_, runs=runs: runs.update(layers=runs["layers"] + 1))
        settings = TrainingSettings(steps=3, batch_size=2, learning_rate=1e-2, gradient_checkpointing=used)
        objective = build_objective(model, beta=1.0)
        runs["layers"] = 0
        run_training(
            objective, tiny_windows(6), mask=None, settings=settings, origin={}, workdir=tmp_path / str(used), context=Context(), name=""
        )
        found[used] = (runs["layers"], weights(model))
    assert found[True][0] == 2 * found[False][0] == 6  # computed again in the backward pass
    assert torch.equal(found[True][1], found[False][1])


def test_a_checkpoint_whenever_minutes_have_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 100_000, 20))  # each look at the clock is 20 seconds after the one before
    monkeypatch.setattr("compression.training.trainer.time.monotonic", lambda: float(next(now)))
    written: list[str] = []
    monkeypatch.setattr("compression.training.trainer.write_checkpoint", lambda place, step, fill, run: written.append(step), raising=True)
    run(Toy(), tmp_path, settings=SETTINGS.model_copy(update={"save_every": 100, "save_minutes": 1.0, "evaluate_every": 0}))
    assert len(written) > 3
    assert written[-1] == 12


class Hungry(Toy):
    """Runs out of memory where a batch has more than `fits` rows, as torch's allocators say it."""

    def __init__(self, fits: int, message: str = "CUDA out of memory. Tried to allocate 2.00 GiB", *, from_step: int = 0):
        super().__init__()
        self.fits, self.message, self.from_step, self.calls = fits, message, from_step, 0

    def forward(self, input_ids: torch.Tensor, loss_mask: torch.Tensor, count: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls += self.training
        if len(input_ids) > self.fits and self.calls > self.from_step:
            raise torch.OutOfMemoryError(self.message) if "CUDA" in self.message else RuntimeError(self.message)
        return super().forward(input_ids, loss_mask, count)


@pytest.mark.slow
@pytest.mark.parametrize("from_step", [0, 7])
@pytest.mark.parametrize(
    "message", ["CUDA out of memory. Tried", "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"]
)
def test_out_of_memory_goes_on_in_smaller_batches_of_the_same_rows(tmp_path: Path, message: str, from_step: int) -> None:
    settings = SETTINGS.model_copy(update={"batch_size": 6, "evaluate_every": 0, "group_by_length": True, "learning_rate": 1e-2})
    plain, hungry = Toy(), Hungry(2, message, from_step=from_step)
    curves: list[dict[int, float]] = [{}, {}]
    run(plain, tmp_path / "plain", settings=settings, mask=some_mask(), metrics=lambda v, step: curves[0].update({step: v["loss"]}))
    warnings: list[str] = []
    metrics = run(
        hungry, tmp_path / "hungry", settings=settings, mask=some_mask(), warn=warnings.append,
        metrics=lambda v, step: curves[1].update({step: v["loss"]}),
    )  # fmt: skip
    assert (metrics["batch_size"], metrics["oom_retries"], metrics["steps"]) == (1, 2, 12)  # 6 has the divisors 3 and 1
    assert ["batch_size 6" in warnings[0], "batches of 3" in warnings[0], "batches of 1" in warnings[1]] == [True] * 3
    torch.testing.assert_close(weights(hungry), weights(plain), rtol=1e-4, atol=1e-5)
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    resumed = run(Hungry(2, message), tmp_path / "hungry", settings=settings, mask=some_mask())
    assert (resumed["batch_size"], resumed["oom_retries"]) == (1, 2)  # known from its checkpoint


def test_a_row_that_does_not_fit_and_other_failures_are_told(tmp_path: Path) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        run(Hungry(0), tmp_path / "row")
    with pytest.raises(RuntimeError, match="size mismatch"):
        run(Hungry(2, "size mismatch"), tmp_path / "other")
    assert not list((tmp_path / "other").iterdir())


def test_precisions_that_this_device_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(Incompatible, match="float16") as caught:
        run(Toy(), tmp_path, settings=SETTINGS.model_copy(update={"precision": "float16"}))
    assert caught.value.key == "precision"


def test_no_clipping_is_a_norm_that_is_never_reached(tmp_path: Path) -> None:
    found = {}
    for norm in (0.0, 1e9, 1e-3):
        model = Toy()
        run(
            model,
            tmp_path / str(norm),
            settings=SETTINGS.model_copy(update={"max_grad_norm": norm, "evaluate_every": 0, "weight_decay": 0.0}),
        )
        found[norm] = weights(model)
    assert torch.equal(found[0.0], found[1e9])
    assert not torch.equal(found[0.0], found[1e-3])
