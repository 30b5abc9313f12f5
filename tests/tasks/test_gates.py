"""The rule of gates: numbers without noise, numbers with an interval, and pairs of items."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from compression.evaluation.bootstrap import interval_figures, value
from compression.evaluation.findings import Items
from tasks.measurement.gates import Bound, Figures, Verdict, judge

values = st.floats(1e-3, 1e3)
OTHERS = {"base": Figures({"perplexity": 10.0, "accuracy": 0.8}), "pruned": Figures({"perplexity": 20.0})}


def verdicts(bound: Bound, figures: float | Figures, metric: str = "perplexity", others: dict[str, Figures] = OTHERS) -> list[Verdict]:
    mine = figures if isinstance(figures, Figures) else Figures({metric: figures})
    return judge({metric: bound}, mine, others)


def outcomes(bound: Bound, figures: float | Figures, metric: str = "perplexity", others: dict[str, Figures] = OTHERS) -> list[str]:
    return [verdict.outcome for verdict in verdicts(bound, figures, metric, others)]


def answered(right: int, of: int, seed: int = 0) -> Figures:
    """A model that answered so many questions right."""
    correct = np.random.default_rng(seed).permutation(np.arange(of) < right).astype(float)
    items = Items(tuple(correct), (1.0,) * of)
    return Figures({"accuracy": value(items), **interval_figures("accuracy", items, "")}, {"accuracy": items})


@settings(deadline=None)
@given(values, values)
def test_absolute_bounds_include_the_bound_itself(figure: float, limit: float) -> None:
    assert outcomes(Bound(max=limit), figure) == ["PASS" if figure <= limit else "FAIL"]
    assert outcomes(Bound(min=limit), figure) == ["PASS" if figure >= limit else "FAIL"]
    assert outcomes(Bound(min=figure, max=figure), figure) == ["PASS", "PASS"]


@pytest.mark.parametrize(
    ("bound", "figure", "expected"),
    [
        (Bound(max_increase=0.05), 10.49, ["PASS"]),
        (Bound(max_increase=0.05), 10.51, ["FAIL"]),
        (Bound(max_decrease=0.05), 9.51, ["PASS"]),
        (Bound(max_decrease=0.05), 9.49, ["FAIL"]),
        (Bound(max_rise=0.05), 10.049, ["PASS"]),
        (Bound(max_rise=0.05), 10.051, ["FAIL"]),
        (Bound(max_drop=0.05), 9.951, ["PASS"]),
        (Bound(max_drop=0.05), 9.949, ["FAIL"]),
        (Bound(max_increase=0.05, relative_to="pruned"), 20.9, ["PASS"]),
        (Bound(max_increase=0.05, max_decrease=0.05), 11, ["FAIL", "PASS"]),
        (Bound(max=9, max_increase=1), 11, ["FAIL", "PASS"]),
    ],
)
def test_relative_bounds(bound: Bound, figure: float, expected: list[str]) -> None:
    assert outcomes(bound, figure) == expected


@pytest.mark.parametrize(("bound", "figure"), [(Bound(max_increase=0.5), -0.6), (Bound(max_decrease=0.5), -1.4)])
def test_share_of_negative_number(bound: Bound, figure: float) -> None:
    others = {"base": Figures({"delta": -1.0})}
    assert outcomes(bound, figure, "delta", others) == ["PASS"]


def test_share_in_percent() -> None:
    assert Bound.model_validate({"max_increase": "5%"}) == Bound(max_increase=0.05)
    for wrong in ("many%", "-1%", "nan%", -0.1):
        with pytest.raises(ValidationError):
            Bound.model_validate({"max_increase": wrong})
    with pytest.raises(ValidationError):
        Bound.model_validate({"max_decrease": "101%"})


@pytest.mark.parametrize("document", [{}, {"relative_to": "base"}, {"strict": True}, {"maximum": 3}, {"min": math.nan}, {"max": math.inf}])
def test_empty_bound_is_refused(document: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Bound.model_validate(document)


def test_unmeasured_metric_fails() -> None:
    (verdict,) = verdicts(Bound(min=0), Figures({"perplexity": 1}), "accuracy")
    assert verdict.outcome == "FAIL" and "accuracy was not measured; measured: perplexity" in verdict.message
    (verdict,) = verdicts(Bound(max_decrease=1, relative_to="pruned"), 1, "accuracy")
    assert verdict.outcome == "FAIL" and "accuracy of pruned was not measured" in verdict.message


def test_if_measured_skips_unmeasured_metric() -> None:
    assert verdicts(Bound(min=0, if_measured=True), Figures({"perplexity": 1}), "accuracy") == []
    assert verdicts(Bound(max_drop=1, relative_to="pruned", if_measured=True), 1, "accuracy") == []
    assert outcomes(Bound(min=2, if_measured=True), 1) == ["FAIL"]


@pytest.mark.parametrize("bound", [Bound(max=1e9), Bound(min=-1e9), Bound(max_increase=9), Bound(max_decrease=1), Bound(max_drop=9)])
def test_nonfinite_value_fails(bound: Bound) -> None:
    for figure in (math.nan, math.inf, -math.inf):
        assert outcomes(bound, figure) == ["FAIL"]
        if bound.relative:
            assert outcomes(bound, 1.0, others={"base": Figures({"perplexity": figure})}) == ["FAIL"]
    contended = Figures({"tokens_per_second": math.nan, "cpu_wait_share": 0.6})
    assert outcomes(Bound(min=1), contended, "tokens_per_second") == ["FAIL"]


def test_standard_error_is_noise() -> None:
    """Groups of the harness tell one, and no items."""
    mine = Figures({"harness.mmlu.acc": 0.485, "harness.mmlu.acc_stderr": 0.004})
    base = Figures({"harness.mmlu.acc": 0.4952, "harness.mmlu.acc_stderr": 0.004})
    (verdict,) = judge({"harness.mmlu.acc": Bound(max_drop=0.01)}, mine, {"base": base})
    assert verdict.outcome == "INCONCLUSIVE"
    assert (verdict.low, verdict.high) == pytest.approx((0.485 - 1.96 * 0.004 * 2**0.5, 0.485 + 1.96 * 0.004 * 2**0.5))


@settings(deadline=None)
@given(values, values, st.floats(0, 100), st.floats(0, 100), st.booleans())
def test_outcome_follows_interval(figure: float, limit: float, below: float, above: float, strict: bool) -> None:
    """PASS if the value and all of its interval keep the limit, FAIL if none of it does, else INCONCLUSIVE; mirrored for `min`."""
    low, high = figure - below, figure + above
    expected = "PASS" if high <= limit else "FAIL" if low > limit else "INCONCLUSIVE"
    expected = "FAIL" if strict and expected == "INCONCLUSIVE" else expected
    mine = Figures({"m": figure, "m_low": low, "m_high": high})
    assert outcomes(Bound(max=limit, strict=strict), mine, "m") == [expected]
    mirrored = Figures({"m": -figure, "m_low": -high, "m_high": -low})
    assert outcomes(Bound(min=-limit, strict=strict), mirrored, "m") == [expected]


@settings(deadline=None)
@given(values, values, st.floats(0, 10), st.floats(0, 10))
def test_looser_limit_never_worsens_outcome(figure: float, limit: float, noise: float, more: float) -> None:
    order = ["FAIL", "INCONCLUSIVE", "PASS"]
    mine = Figures({"m": figure, "m_low": figure - noise, "m_high": figure + noise})
    (tight,), (loose,) = (outcomes(Bound(max=bar), mine, "m") for bar in (limit, limit + more))
    assert order.index(loose) >= order.index(tight)
    wide = Figures({"m": figure, "m_low": figure - noise - more, "m_high": figure + noise + more})
    if outcomes(Bound(max=limit), wide, "m") != ["INCONCLUSIVE"]:
        assert outcomes(Bound(max=limit), wide, "m") == [tight]


def test_verdict_keeps_value_limit_interval() -> None:
    mine = Figures({"m": 12.0, "m_low": 11.0, "m_high": 14.0})
    (verdict,) = verdicts(Bound(max=10), mine, "m")
    assert verdict == Verdict("m", "FAIL", "m 12 is not at most 10 (2 too much), beyond the noise of ±1.5", "at most", 12, 10, 11, 14)
    (verdict,) = verdicts(Bound(max=13), mine, "m")
    assert (verdict.outcome, verdict.message) == ("INCONCLUSIVE", "m 12 is at most 13; the limit is within the noise of ±1.5")
    (verdict,) = verdicts(Bound(max=9.5), 9.0)
    assert verdict == Verdict("perplexity", "PASS", "perplexity 9 is at most 9.5", "at most", 9, 9.5)


def test_message_has_metric_limit_and_reference() -> None:
    (verdict,) = verdicts(Bound(max_increase=0.05), 12)
    assert verdict.message == "perplexity 12 is not at most 10.5 (base 10: a rise of 20%, allowed 5%)"
    (verdict,) = verdicts(Bound(max_drop=0.02), 0.75, "accuracy")
    assert verdict.message == "accuracy 0.75 is not at least 0.78 (base 0.8: a drop of 0.05, allowed 0.02)"


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.floats(0, 0.5))
def test_shared_items_are_paired(mine: int, theirs: int, allowed: float) -> None:
    """The same questions answered alike leave no noise in the difference, whatever the noise of each."""
    one, same = answered(mine, 40), answered(mine, 40)
    assert outcomes(Bound(max_drop=allowed), one, "accuracy", {"base": same}) == ["PASS"]
    other = answered(theirs, 40, seed=1)
    (verdict,) = verdicts(Bound(max_drop=allowed), one, "accuracy", {"base": other})
    assert verdict.limit == pytest.approx(theirs / 40 - allowed)
    expected = mine / 40 >= verdict.limit
    assert {"PASS": expected, "FAIL": not expected}.get(verdict.outcome, True)


def test_drop_within_noise_is_inconclusive() -> None:
    base, mine = answered(80, 100), answered(78, 100, seed=1)
    (verdict,) = verdicts(Bound(max_drop=0.01), mine, "accuracy", {"base": base})
    assert verdict.outcome == "INCONCLUSIVE" and verdict.low is not None and verdict.high is not None
    assert verdict.low < verdict.limit < verdict.high
    assert "(base 0.8: a drop of 0.02, allowed 0.01); the limit is within the noise of ±0.1" in verdict.message
    assert outcomes(Bound(max_drop=0.01, strict=True), mine, "accuracy", {"base": base}) == ["FAIL"]
    assert outcomes(Bound(max_drop=0.01), answered(20, 100, seed=1), "accuracy", {"base": base}) == ["FAIL"]


def test_independent_intervals_add_in_quadrature() -> None:
    """MOVER on two symmetric intervals is the sum of independent normal errors: sqrt(3² + 4²)."""
    base = Figures({"m": 100.0, "m_low": 96.0, "m_high": 104.0})
    mine = Figures({"m": 90.0, "m_low": 87.0, "m_high": 93.0})
    (verdict,) = verdicts(Bound(max_drop=0), mine, "m", {"base": base})
    assert verdict.outcome == "FAIL" and (verdict.low, verdict.high) == (pytest.approx(85), pytest.approx(95))
    assert outcomes(Bound(max_drop=8), mine, "m", {"base": base}) == ["INCONCLUSIVE"]
    assert outcomes(Bound(max_drop=15), mine, "m", {"base": base}) == ["PASS"]


def test_contended_timing_fails_no_bound() -> None:
    busy = Figures({"tokens_per_second": 100.0, "cpu_wait_share": 0.6, "size_mb": 9.0})
    quiet = Figures({"tokens_per_second": 900.0, "cpu_wait_share": 0.01})
    bounds = {"tokens_per_second": Bound(min=500), "size_mb": Bound(max=5)}
    (speed, size) = judge(bounds, busy, {})
    assert (speed.outcome, size.outcome) == ("INCONCLUSIVE", "FAIL") and "other programs had the cores" in speed.message
    as_fast = {"tokens_per_second": Bound(max_decrease=0.1)}
    assert [judge(as_fast, one, {"base": other})[0].outcome for one, other in ((busy, quiet), (quiet, busy))] == ["INCONCLUSIVE", "PASS"]
    assert [judge({"tokens_per_second": Bound(min=500, strict=True)}, busy, {})[0].outcome] == ["FAIL"]
    assert [judge({"tokens_per_second": Bound(min=50)}, busy, {})[0].outcome] == ["PASS"]
