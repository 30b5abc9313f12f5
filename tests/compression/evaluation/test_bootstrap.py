"""The bootstrap, against scipy's, the normal approximation, McNemar's variance, and what it promises: the truth in 95 of 100 intervals."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from compression.evaluation.bootstrap import Interval, comparison_figures, interval_figures, middle, paired, resample, value
from compression.evaluation.findings import Items


def windows(seed: int, count: int = 64, length: int = 31, mean: float = 2.0, like: np.ndarray | None = None) -> tuple[Items, np.ndarray]:
    """Items of perplexity: negative log-likelihoods per window; those of a second model lie near the first's, `like`."""
    draw = np.random.default_rng(seed)
    sums = length * (mean + draw.normal(scale=0.5, size=count)) if like is None else like + length * draw.normal(mean, 0.05, count)
    return Items(tuple(sums), (float(length),) * count, "exp"), sums


def answers(correct: np.ndarray) -> Items:
    return Items(tuple(correct.astype(float)), (1.0,) * len(correct))


def test_the_value_is_transform_of_sum_by_count() -> None:
    items, sums = windows(0)
    assert value(items) == pytest.approx(math.exp(sums.sum() / (64 * 31)), rel=1e-12)
    assert value(Items((1.0, 4.0), (1.0, 3.0))) == 5 / 4


def test_a_ratio_of_sums_is_scipys_bootstrap_of_pairs() -> None:
    """Perplexity ratio of two models, and a mean over windows of unequal lengths; scipy resamples both arrays with the same indices."""
    draw = np.random.default_rng(3)
    one, sums = windows(0)
    other, moved = windows(1, mean=0.05, like=sums)
    found = comparison_figures("perplexity", other, one, "seed")
    judge = stats.bootstrap(
        (moved, sums), lambda a, b, axis: np.exp((a.sum(axis) - b.sum(axis)) / (64 * 31)), paired=True, method="percentile", rng=draw
    ).confidence_interval
    width = judge.high - judge.low
    assert found["perplexity_ratio"] == pytest.approx(math.exp((moved - sums).sum() / (64 * 31)))
    assert found["perplexity_ratio_low"] == pytest.approx(judge.low, abs=0.05 * width)
    assert found["perplexity_ratio_high"] == pytest.approx(judge.high, abs=0.05 * width)
    counts = draw.integers(1, 40, 50).astype(float)
    totals = counts * draw.normal(2, 1, 50)
    mine = interval_figures("m", Items(tuple(totals), tuple(counts)), "seed")
    judge = stats.bootstrap(
        (totals, counts), lambda a, b, axis: a.sum(axis) / b.sum(axis), paired=True, method="percentile", rng=draw
    ).confidence_interval
    assert mine["m_low"] == pytest.approx(judge.low, abs=0.05 * (judge.high - judge.low))
    assert mine["m_high"] == pytest.approx(judge.high, abs=0.05 * (judge.high - judge.low))


def test_the_difference_of_accuracies_has_the_width_of_mcnemars_variance() -> None:
    """Of paired answers: (b + c - (b - c)² / n) / n², where b and c are the questions that one model alone answered."""
    draw = np.random.default_rng(0)
    base = draw.random(2000) < 0.8
    mine = np.where(draw.random(2000) < 0.1, ~base, base)
    figures = comparison_figures("accuracy", answers(mine), answers(base), "seed")
    lost, won = float((base & ~mine).sum()), float((mine & ~base).sum())
    error = math.sqrt(lost + won - (won - lost) ** 2 / 2000) / 2000
    assert figures["accuracy_delta"] == pytest.approx((won - lost) / 2000)
    assert figures["accuracy_delta_low"] == pytest.approx(figures["accuracy_delta"] - 1.96 * error, abs=0.1 * error)
    assert figures["accuracy_delta_high"] == pytest.approx(figures["accuracy_delta"] + 1.96 * error, abs=0.1 * error)


def test_pairing_is_what_makes_the_interval_narrow() -> None:
    one, sums = windows(0)
    other, _ = windows(1, mean=0.05, like=sums)
    figures = comparison_figures("perplexity", other, one, "seed")
    alone = interval_figures("perplexity", other, "seed")
    width = (figures["perplexity_ratio_high"] - figures["perplexity_ratio_low"]) / figures["perplexity_ratio"]
    assert 5 * width < (alone["perplexity_high"] - alone["perplexity_low"]) / value(other)


@pytest.mark.parametrize("transform", ["mean", "exp"])
def test_about_95_of_100_intervals_hold_the_truth(transform: str) -> None:
    """400 synthetic comparisons of 100 skewed items each; three standard errors of that count are 0.033 to either side."""
    draw = np.random.default_rng(7)
    held = 0
    for trial in range(400):
        base = draw.gamma(2.0, size=100)
        mine = base + draw.normal(0.1, 0.3, size=100)
        one, other = (Items(tuple(x), (1.0,) * 100, "exp" if transform == "exp" else "mean") for x in (mine, base))
        a, b = resample(str(trial), one, other, resamples=1000)
        found = middle(a / b if transform == "exp" else a - b)
        held += found.low <= (math.exp(0.1) if transform == "exp" else 0.1) <= found.high
    assert 0.91 < held / 400 < 0.98


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.floats(-10, 10), st.integers(1, 5)), min_size=2, max_size=30), st.floats(0.1, 3), st.floats(-5, 5))
def test_intervals_scale_and_move_with_their_items(drawn: list[tuple[float, int]], scale: float, shift: float) -> None:
    sums, counts = tuple(s for s, _ in drawn), tuple(float(c) for _, c in drawn)
    (plain,) = resample("seed", Items(sums, counts), resamples=50)
    (moved,) = resample("seed", Items(tuple(scale * s + shift * c for s, c in zip(sums, counts, strict=True)), counts), resamples=50)
    np.testing.assert_allclose(moved, scale * plain + shift, atol=1e-9)


def test_equal_seeds_draw_alike_and_others_do_not() -> None:
    items, _ = windows(0)
    (one,), (same,), (other,) = (resample(seed, items) for seed in ("a", "a", "b"))
    assert (one == same).all() and (one != other).any() and len(one) == 10_000


def test_many_items_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    items, _ = windows(0, count=300)
    whole = middle(resample("seed", items)[0])
    monkeypatch.setattr("compression.evaluation.bootstrap._CHUNK", 1000)
    (sample,) = resample("seed", items)
    assert len(sample) == 10_000
    assert middle(sample) == Interval(pytest.approx(whole.low, rel=1e-2), pytest.approx(whole.high, rel=1e-2))


def test_what_cannot_be_paired_has_no_interval() -> None:
    two, three = Items((1.0, 2.0), (1.0, 1.0)), Items((1.0, 2.0, 3.0), (1.0, 1.0, 1.0))
    assert (
        not paired(two, three)
        and not paired(two, Items((1.0, 2.0), (1.0, 2.0)))
        and not paired(Items((1.0,), (1.0,)), Items((1.0,), (1.0,)))
    )
    assert comparison_figures("m", three, two, "seed") == {"m_delta": 0.5}
    assert interval_figures("m", Items((1.0,), (1.0,)), "seed") == {}


def test_equal_answers_leave_no_noise_in_the_difference() -> None:
    items = answers(np.arange(50) < 30)
    assert comparison_figures("accuracy", items, items, "seed") == {"accuracy_delta": 0, "accuracy_delta_low": 0, "accuracy_delta_high": 0}


def test_a_loss_beyond_floats_is_an_infinite_perplexity() -> None:
    huge, mixed = Items((8e4, 9e4, 8.5e4), (100.0,) * 3, "exp"), Items((1.0, 3e5, 2.0, 1.5), (100.0,) * 4, "exp")
    assert value(huge) == math.inf
    assert interval_figures("perplexity", huge, "seed") == {"perplexity_low": math.inf, "perplexity_high": math.inf}
    found = interval_figures("perplexity", mixed, "seed")
    assert found["perplexity_low"] < 2 < found["perplexity_high"] == math.inf
    small = Items((1.0, 2.0, 1.5), (100.0,) * 3, "exp")
    assert comparison_figures("perplexity", huge, small, "seed")["perplexity_ratio"] == math.inf
