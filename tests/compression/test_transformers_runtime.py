import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from compression.checkpoints.loading import load_model
from compression.errors import EdgepressError, Incompatible
from compression.evaluation import contention, generation
from compression.evaluation.generation import generate
from compression.evaluation.runtime import Runtime
from compression.evaluation.speed import measure_speed
from compression.evaluation.transformers_runtime import TransformersRuntime
from tests.tiny import tiny_windows


@pytest.fixture(scope="module")
def runtime(checkpoint: Path) -> Runtime:
    return TransformersRuntime(checkpoint, threads=1)


def test_logits_are_the_models_and_padding_changes_nothing_before_it(runtime: Runtime, checkpoint: Path) -> None:
    rows = tiny_windows(3, 20)
    with torch.no_grad():
        expected = load_model(checkpoint)(input_ids=rows).logits
    logits = runtime.logits(rows.numpy())
    assert logits.dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(logits), expected)
    padded = np.concatenate([rows.numpy(), np.ones((3, 7), dtype=np.int64)], axis=1)
    np.testing.assert_allclose(runtime.logits(padded)[:, :20], logits, atol=1e-4)


def test_generation_is_transformers_greedy_search_of_exact_length(runtime: Runtime, checkpoint: Path) -> None:
    prompt = tiny_windows(1, 12)
    model = load_model(checkpoint)
    model.generation_config.eos_token_id = None
    expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False)[0, 12:]
    generation = generate(runtime, prompt[0].tolist(), 20)
    assert generation.tokens == expected.tolist()
    assert generation.prefill_seconds > 0
    assert generation.decode_seconds > 0


def test_what_does_not_fit_the_context_is_refused(runtime: Runtime) -> None:
    assert (runtime.max_length, runtime.timed, runtime.name) == (128, True, "transformers")
    with pytest.raises(Incompatible, match="120 \\+ 9 tokens"):
        generate(runtime, [0] * 120, 9)


class Clockwork:
    """A runtime with known times and memory: the first run is slow, as a first run is. Its clock moves when it is asked something."""

    name, version, max_length = "clockwork", "1", 1000

    def __init__(self, *, timed: bool = True, megabytes: int = 0):
        self.timed, self.runs, self.closed, self.now = timed, 0, False, 0.0
        self.memory = np.ones(megabytes * 10**6, dtype=np.uint8)

    def perf_counter(self) -> float:
        return self.now

    def logits(self, input_ids: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def start(self, prompt: list[int], new_tokens: int) -> np.ndarray:
        self.runs += 1
        self.seconds = {1: 100.0, 2: 1.0, 3: 2.0, 4: 9.0}[self.runs]
        self.now += self.seconds
        return np.zeros(2)

    def step(self, token: int) -> np.ndarray:
        self.now += self.seconds / 8
        return np.zeros(2)

    def close(self) -> None:
        self.closed, self.memory = True, np.empty(0)


def test_speed_is_the_median_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Clockwork()
    monkeypatch.setattr(generation, "time", runtime)
    monkeypatch.setattr(contention, "_waited_seconds", lambda: None)
    figures = measure_speed(lambda: runtime, [0] * 10, new_tokens=5, repeats=3)
    assert figures["prefill_tokens_per_second"] == 10 / 2.0
    assert figures["tokens_per_second"] == 4 / 1.0
    assert figures["load_seconds"] >= 0 and "cpu_wait_share" not in figures
    assert (runtime.runs, runtime.closed) == (4, True)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a part of a process is told by Linux only")
def test_peak_memory_is_what_the_runtime_added() -> None:
    before = np.ones(300 * 10**6, dtype=np.uint8)  # a peak from before, which must not count
    del before
    held = np.ones(50 * 10**6, dtype=np.uint8)  # held throughout: baseline, which must not count either
    peaks = (measure_speed(lambda: Clockwork(megabytes=120), [0], new_tokens=2, repeats=1)["peak_memory_mb"] for _ in range(20))
    assert any(115 < peak < 150 for peak in peaks)  # a kernel that reclaims pages of ours meanwhile hides as much of a peak
    assert held.any()


def test_an_untimed_runtime_gives_no_figures_and_is_closed() -> None:
    runtime = Clockwork(timed=False)
    assert measure_speed(lambda: runtime, [0], new_tokens=2) == {}
    assert (runtime.runs, runtime.closed) == (0, True)
    with pytest.raises(EdgepressError, match="two new tokens"):
        measure_speed(Clockwork, [0], new_tokens=1)


def test_speed_of_a_real_checkpoint(checkpoint: Path) -> None:
    figures = measure_speed(lambda: TransformersRuntime(checkpoint, threads=1), [0] * 16, new_tokens=8, repeats=1)
    assert all(value >= 0 for value in figures.values())
    assert {"tokens_per_second", "prefill_tokens_per_second", "load_seconds"} <= set(figures)
