"""The teacher cache against the teacher itself, float64 formulas, kills, damage and other processes."""

from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch

from compression.checkpoints.checkpoint import file_digests
from compression.checkpoints.loading import load_model
from compression.context import Context
from compression.distillation import CacheSettings, Objective
from compression.distillation.settings import Divergence
from compression.distillation.teacher_cache import TeacherCache, open_teacher_cache
from compression.errors import EdgepressError, Incompatible
from compression.training import TrainingSettings
from tests.compression.test_losses import reference, softmax
from tests.tiny import tiny_checkpoint, tiny_windows
from tests.trainings import build_objective, run_distillation

SETTINGS = TrainingSettings(steps=4, batch_size=4, learning_rate=1e-2, save_every=100)
FULL = CacheSettings("full")
Open = Callable[..., TeacherCache]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("student") / "llama", hidden=32, intermediate=96, layers=1, seed=7)


def masked() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows with a prompt and padding behind; two differ in their targets alone, one has nothing to learn from."""
    rows = tiny_windows(5, 16)
    rows[3] = rows[1]
    starts, ends = torch.tensor([5, 0, 11, 3, 9]), torch.tensor([16, 9, 16, 9, 9])
    positions = torch.arange(16)[None]
    return rows, (positions >= starts[:, None]) & (positions < ends[:, None])


@pytest.fixture
def opened(tmp_path: Path, checkpoint: Path) -> Open:
    def make(settings: CacheSettings = FULL, teacher: Path = checkpoint, temperature: float = 2.0, **others: Any) -> TeacherCache:
        rows, mask = masked()
        arguments = {"vocabulary": 320, "context": Context(), "rows": rows, "mask": mask} | others
        return open_teacher_cache(tmp_path / "cache", teacher, settings=settings, temperature=temperature, **arguments)

    return make


def terms(objective: Objective, chosen: list[int], length: int = 16) -> tuple[float, torch.Tensor]:
    """loss_kd and the gradient for some rows in some order, cut behind `length`."""
    rows, mask = masked()
    objective.zero_grad()
    found = objective(rows[chosen, :length], mask[chosen, :length])
    found["loss"].backward()
    gradients = [p.grad.flatten() for p in objective.student.parameters() if p.grad is not None]
    return found["loss_kd"].item(), torch.cat(gradients)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "js"])
@pytest.mark.parametrize("max_logits", [2**24, 320 * 4])
def test_full_is_the_loss_without_a_cache(opened: Open, student: Path, checkpoint: Path, divergence: Divergence, max_logits: int) -> None:
    """In any order, and for batches that are cut behind their last target."""
    settings: dict[str, Any] = {"alpha": 1.0, "beta": 0.5, "temperature": 2.0, "divergence": divergence, "max_logits": max_logits}
    live = build_objective(load_model(student), teacher=load_model(checkpoint), **settings)
    cached = build_objective(load_model(student), cache=opened(), **settings)
    for chosen, length in (([0, 1, 2, 3, 4], 16), ([3, 1], 12), ([4, 2, 2], 16), ([1], 9)):
        expected, slope = terms(live, chosen, length)
        value, gradient = terms(cached, chosen, length)
        assert value == pytest.approx(expected, rel=1e-6)
        torch.testing.assert_close(gradient, slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "js"])
def test_top_k_is_the_formula_over_k_tokens_and_the_rest(opened: Open, student: Path, checkpoint: Path, divergence: Divergence) -> None:
    rows, mask = masked()
    objective = build_objective(
        load_model(student), cache=opened(CacheSettings("top_k", 7)), alpha=1.0, temperature=2.0, divergence=divergence
    )
    with torch.no_grad():
        ours, theirs = (load_model(path).double()(input_ids=rows).logits[:, :-1][mask[:, 1:]].numpy() for path in (student, checkpoint))
    top = np.argsort(theirs, -1)[:, -7:]

    def merged(logits: np.ndarray) -> np.ndarray:
        whole = softmax(logits / 2)
        kept = np.take_along_axis(whole, top, -1)
        return np.concatenate([kept, 1 - kept.sum(-1, keepdims=True)], -1)

    expected = reference(divergence, merged(ours), merged(theirs), 2.0).mean()
    assert objective(rows, mask)["loss_kd"].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("keep", ["full", "top_k"])
def test_float16_is_half_as_large_and_close(opened: Open, student: Path, keep: Any) -> None:
    def value(dtype: Any) -> tuple[float, int]:
        cache = opened(CacheSettings(keep, 7, dtype))
        return terms(build_objective(load_model(student), cache=cache, alpha=1.0, temperature=2.0), [0, 1, 2, 3])[0], cache.nbytes

    (exact, large), (close, small) = value("float32"), value("float16")
    assert close == pytest.approx(exact, rel=2e-3)
    assert close != exact
    positions = int(masked()[1][:, 1:].sum())
    assert (large, small) == {"full": (256 * positions, 128 * positions), "top_k": (60 * positions, 44 * positions)}[keep]


def distilled(
    student: Path, teacher: Path, home: Path, name: str, *, settings: TrainingSettings = SETTINGS, **others: Any
) -> dict[str, float]:
    arguments = {"teacher_cache": FULL, "cache_folder": home / "cache", "context": Context()} | others
    return run_distillation(student, teacher, home / name, tiny_windows(8), settings=settings, workdir=home / f"{name}-work", **arguments)


def no_teacher(*_: object, **__: object) -> None:
    raise AssertionError("the teacher was loaded")


@pytest.mark.parametrize("cache", [FULL, CacheSettings("top_k", 16)], ids=["full", "top_k"])
def test_the_teacher_runs_once_for_all_trainings(
    tmp_path: Path, student: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, cache: CacheSettings
) -> None:
    """Other seeds, steps and weights of the loss share it; the same training from a cache that another left has the same bytes."""
    first = distilled(student, checkpoint, tmp_path, "first", teacher_cache=cache)
    monkeypatch.setattr("compression.distillation.teacher_cache.load_model", no_teacher)
    monkeypatch.setattr("compression.distillation.method.load_model", no_teacher)
    again = distilled(student, checkpoint, tmp_path, "again", teacher_cache=cache)
    other = distilled(student, checkpoint, tmp_path, "other", teacher_cache=cache, context=Context(seed=3), divergence="js", beta=0.1)
    assert [metrics["teacher_cache_built"] for metrics in (first, again, other)] == [1, 0, 0]
    assert first["loss_kd"] == again["loss_kd"] != other["loss_kd"]
    assert file_digests(tmp_path / "first") == file_digests(tmp_path / "again") != file_digests(tmp_path / "other")


def test_a_training_with_full_ends_where_one_without_does(tmp_path: Path, student: Path, checkpoint: Path) -> None:
    distilled(student, checkpoint, tmp_path, "cached")
    distilled(student, checkpoint, tmp_path, "live", teacher_cache=None)
    cached, live = (dict(load_model(tmp_path / name).named_parameters()) for name in ("cached", "live"))
    for name, weight in live.items():
        torch.testing.assert_close(cached[name], weight, rtol=1e-4, atol=1e-5)


def test_validation_rows_are_kept_too(tmp_path: Path, student: Path, checkpoint: Path) -> None:
    settings = TrainingSettings(steps=4, batch_size=4, evaluate_every=2)
    held_out = tiny_windows(3, 20, seed=5), None  # of another length
    cached = distilled(student, checkpoint, tmp_path, "cached", settings=settings, validation=held_out)
    live = distilled(student, checkpoint, tmp_path, "live", settings=settings, validation=held_out, teacher_cache=None)
    assert cached["validation_loss"] == pytest.approx(live["validation_loss"], rel=1e-5)


def test_damage_is_told_and_mended(tmp_path: Path, opened: Open) -> None:
    assert opened().built
    assert not opened().built
    (file,) = (tmp_path / "cache").glob("*/checkpoint-1/hidden.npy")
    before = file.read_bytes()
    file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    said: list[str] = []
    assert opened(context=Context(warn=said.append)).built
    assert len(said) == 1 and "damaged" in said[0]
    assert file.read_bytes() == before


def test_a_kill_leaves_nothing_that_is_taken_for_a_cache(tmp_path: Path, opened: Open) -> None:
    class Killed(BaseException):
        pass

    def kill(done: int, total: int, what: str) -> None:
        raise Killed

    with pytest.raises(Killed):
        opened(context=Context(progress=kill))
    assert not list((tmp_path / "cache").glob("*/*checkpoint-1"))
    (home,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    (home / ".partial-checkpoint-1").mkdir()  # SIGKILL would have left it
    assert opened().built
    assert not list((tmp_path / "cache").glob("*/.partial-*"))


def test_those_who_ask_at_once_wait_for_the_one_who_makes_it(opened: Open) -> None:
    caches: list[TeacherCache] = []
    threads = [Thread(target=lambda: caches.append(opened())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(cache.built for cache in caches) == [False, False, True]


def test_what_decides_its_bytes_makes_another_one(tmp_path: Path, opened: Open) -> None:
    rows, mask = masked()
    another = tiny_checkpoint(tmp_path / "another", seed=1)
    top = CacheSettings("top_k", 7)
    for arguments in (
        {}, {"teacher": another}, {"rows": rows.flip(0)}, {"mask": mask | True}, {"vocabulary": 300}, {"settings": top},
        {"settings": CacheSettings("top_k", 8)}, {"settings": top, "temperature": 3.0}, {"settings": CacheSettings("full", 64, "float16")},
    ):  # fmt: skip
        assert opened(**arguments).built, arguments
        assert not opened(**arguments).built, arguments
    assert not opened(temperature=3.0).built  # full says nothing about a temperature
    assert not opened(CacheSettings("full", 99)).built


def test_what_a_cache_cannot_give_is_refused(tmp_path: Path, opened: Open, student: Path, checkpoint: Path) -> None:
    with pytest.raises(Incompatible, match="compares blocks") as caught:
        distilled(student, checkpoint, tmp_path, "out", gamma=0.1)
    assert caught.value.key == "teacher_cache"
    with pytest.raises(Incompatible, match="no output of a teacher"):
        distilled(student, checkpoint, tmp_path, "out", alpha=0.0, beta=1.0)
    with pytest.raises(Incompatible, match="no tail") as caught:
        distilled(student, checkpoint, tmp_path, "out", teacher_cache=CacheSettings("top_k", 320))
    assert caught.value.key == "top_k"
    objective = build_objective(load_model(student), cache=opened(), alpha=1.0, temperature=2.0)
    with pytest.raises(EdgepressError, match="not made for a row"):
        objective(tiny_windows(2, 16, seed=9), torch.ones(2, 16, dtype=torch.bool))
    for arguments in ({"teacher": load_model(checkpoint), "temperature": 2.0}, {"temperature": 1.0}):
        with pytest.raises(EdgepressError, match="pass the cache alone"):
            build_objective(load_model(student), cache=opened(), alpha=1.0, **arguments)


def test_a_value_that_float16_cannot_hold_is_refused(tmp_path: Path, opened: Open) -> None:
    model = load_model(tiny_checkpoint(tmp_path / "loud"))
    with torch.no_grad():
        model.model.norm.weight *= 1e6
    model.save_pretrained(tmp_path / "loud")
    with pytest.raises(Incompatible, match="not finite in float16") as caught, pytest.warns(RuntimeWarning, match="overflow"):
        opened(CacheSettings("full", dtype="float16"), teacher=tmp_path / "loud")
    assert caught.value.key == "cache_dtype"
