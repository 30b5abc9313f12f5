import math

import pytest

from export.proof import KL_TO_PARENT, Bounds, Change, default_bounds, prove


def test_bounds_are_the_documented_ones() -> None:
    assert dict(KL_TO_PARENT) == {"float": 1e-4, "int8": 0.01, "int8-static": 0.05, "int4": 0.15, "carried": 1e-3}


@pytest.mark.parametrize("change", KL_TO_PARENT)
def test_default_bounds_hold_to_the_bound_and_no_further(change: Change) -> None:
    bound = KL_TO_PARENT[change]
    bounds = default_bounds(change)
    assert prove({"kl_to_parent": bound}, bounds).passed
    assert not prove({"kl_to_parent": math.nextafter(bound, 1)}, bounds).passed


@pytest.mark.parametrize("metrics", [{}, {"kl_to_parent": math.nan}, {"kl_to_parent": math.inf}, {"accuracy": 1.0}])
def test_what_was_not_measured_fails(metrics: dict[str, float]) -> None:
    verdict = prove(metrics, default_bounds("float"))
    assert not verdict.passed
    assert ("was not measured" in verdict.lines[0]) == ("kl_to_parent" not in metrics)


def test_one_broken_bound_fails_and_every_bound_has_its_line() -> None:
    verdict = prove({"a": 1.0, "b": 3.0}, Bounds({"a": 2.0, "b": 2.0}))
    assert not verdict.passed
    assert verdict.lines == ("pass  a 1, at most 2", "FAIL  b 3, at most 2")
