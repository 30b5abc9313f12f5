import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tasks.gates import Bound, judge

values = st.floats(1e-3, 1e3)
OTHERS = {"base": {"perplexity": 10.0, "accuracy": 0.8}, "pruned": {"perplexity": 20.0}}


def outcomes(bound: Bound, value: float, metric: str = "perplexity") -> list[str]:
    return [verdict.outcome for verdict in judge({metric: bound}, {metric: value}, OTHERS)]


@given(values, values)
def test_absolute_bounds_include_the_bound_itself(value: float, limit: float) -> None:
    assert outcomes(Bound(max=limit), value) == ["PASS" if value <= limit else "FAIL"]
    assert outcomes(Bound(min=limit), value) == ["PASS" if value >= limit else "FAIL"]
    assert outcomes(Bound(min=value, max=value), value) == ["PASS", "PASS"]


@pytest.mark.parametrize(
    ("bound", "value", "expected"),
    [
        (Bound(max_increase=0.05), 10.49, ["PASS"]),
        (Bound(max_increase=0.05), 10.51, ["FAIL"]),
        (Bound(max_decrease=0.05), 9.51, ["PASS"]),
        (Bound(max_decrease=0.05), 9.49, ["FAIL"]),
        (Bound(max_increase=0.05, relative_to="pruned"), 20.9, ["PASS"]),
        (Bound(max_increase=0.05, max_decrease=0.05), 11, ["FAIL", "PASS"]),
        (Bound(max=9, max_increase=1), 11, ["FAIL", "PASS"]),
    ],
)
def test_relative_bounds(bound: Bound, value: float, expected: list[str]) -> None:
    assert outcomes(bound, value) == expected


def test_a_share_may_be_written_in_percent() -> None:
    assert Bound.model_validate({"max_increase": "5%"}) == Bound(max_increase=0.05)
    for wrong in ("many%", "-1%", -0.1):
        with pytest.raises(ValidationError):
            Bound.model_validate({"max_increase": wrong})


@pytest.mark.parametrize("document", [{}, {"relative_to": "base"}, {"maximum": 3}])
def test_a_bound_that_bounds_nothing_is_refused(document: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Bound.model_validate(document)


def test_what_was_not_measured_fails() -> None:
    (verdict,) = judge({"accuracy": Bound(min=0)}, {"perplexity": 1}, OTHERS)
    assert verdict.outcome == "FAIL" and "accuracy was not measured; measured: perplexity" in verdict.message
    (verdict,) = judge({"accuracy": Bound(max_decrease=1, relative_to="pruned")}, {"accuracy": 1}, OTHERS)
    assert verdict.outcome == "FAIL" and "accuracy of pruned was not measured" in verdict.message


@pytest.mark.parametrize("bound", [Bound(max=1e9), Bound(min=-1e9), Bound(max_increase=9), Bound(max_decrease=1)])
def test_no_number_passes_no_bound(bound: Bound) -> None:
    assert outcomes(bound, math.nan) == ["FAIL"]


def test_the_message_says_value_bound_and_reference() -> None:
    (verdict,) = judge({"perplexity": Bound(max_increase=0.05)}, {"perplexity": 12}, OTHERS)
    assert verdict.message == "perplexity 12 is not at most 10.5 (base 10)"
