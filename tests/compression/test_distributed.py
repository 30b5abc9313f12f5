"""Two processes that talk by gloo against one that has all rows itself."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compression.context import Context
from compression.errors import EdgepressError
from compression.pruning import UnstructuredSettings, prune_unstructured
from compression.training import TrainingSettings, in_processes, processes
from tests.tiny import tiny_windows
from tests.trainings import run_finetuning

ONE = TrainingSettings(steps=6, batch_size=4, learning_rate=1e-2, save_every=2, evaluate_every=3, group_by_length=False)
TWO = ONE.model_copy(update={"batch_size": 2})
MASK = torch.rand(11, 32, generator=torch.Generator().manual_seed(3)) < torch.linspace(0.1, 1, 11)[:, None]  # unequal targets
DATA = {"mask": MASK, "validation": (tiny_windows(3, seed=1), None), "method": "full"}


def dies_once(model: Path, out: Path, rows: torch.Tensor, *, context: Context, **parameters: object) -> dict[str, float]:
    """Fine-tunes; the second process is killed at step 5 of the first attempt."""
    mark = out.parent / "died"

    def progress(done: int, total: int, what: str) -> None:
        context.progress(done, total, what)
        if done == 5 and processes.rank() == 1 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    return run_finetuning(model, out, rows, context=replace(context, progress=progress), **parameters)


def fails(*, context: Context) -> dict[str, float]:
    raise EdgepressError(f"process {processes.rank()} of {processes.count()} cannot", key="steps")


@pytest.mark.slow
def test_two_processes_train_as_one_with_all_their_rows_also_after_a_kill(tmp_path: Path, checkpoint: Path) -> None:
    sparse = tmp_path / "sparse"
    prune_unstructured(checkpoint, sparse, UnstructuredSettings(method="magnitude", sparsity=0.5), context=Context())
    curves: dict[str, dict[int, dict[str, float]]] = {"one": {}, "two": {}}

    def context(name: str) -> Context:
        return Context(seed=4, metrics=lambda values, step: curves[name].setdefault(step, {}).update(values))

    def in_two() -> dict[str, float]:
        return in_processes(
            2, dies_once, sparse, tmp_path / "two", tiny_windows(11), **DATA, settings=TWO, workdir=tmp_path / "b", context=context("two")
        )

    one = run_finetuning(sparse, tmp_path / "one", tiny_windows(11), **DATA, settings=ONE, workdir=tmp_path / "a", context=context("one"))
    with pytest.raises(RuntimeError, match="exit status -9"):
        in_two()
    two = in_two()
    assert (one["resumed_from_step"], two["resumed_from_step"]) == (0, 4)
    for step, values in curves["one"].items():
        assert curves["two"][step]["loss"] == pytest.approx(values["loss"], rel=1e-4)
        assert values.keys() == curves["two"][step].keys()
    for step in (3, 6):
        assert curves["two"][step]["validation_loss"] == pytest.approx(curves["one"][step]["validation_loss"], rel=1e-4)
    assert (one["validation_loss"], one["best_step"]) == (pytest.approx(two["validation_loss"], rel=1e-4), two["best_step"])
    weights = {name: load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")}
    for name, weight in weights["one"].items():
        torch.testing.assert_close(weights["two"][name], weight, rtol=1e-2, atol=2e-4)
        assert torch.equal(weights["two"][name] == 0, weight == 0)


@pytest.mark.slow
def test_what_a_process_raises_is_raised_here() -> None:
    with pytest.raises(EdgepressError, match=r"process [01] of 2 cannot") as caught:
        in_processes(2, fails, context=Context())
    assert caught.value.key == "steps"
