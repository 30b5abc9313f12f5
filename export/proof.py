"""Verdicts about exported artifacts: measured figures against bounds, and nothing else. Imports no torch.

A verdict is computed from records, so another bound re-exports and re-measures nothing.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

# What an exporter did to the weights; it decides how far the artifact may move from its parent.
Change = Literal["float", "int8", "int8-static", "int4", "carried"]

KL_TO_PARENT: Mapping[Change, float] = {
    "float": 1e-4,  # f32, f16, bf16: rounding of a float type
    "int8": 1e-2,  # q8_0, and int8 with ranges taken at run time
    "int8-static": 5e-2,  # int8 with ranges from calibration
    "int4": 1.5e-1,  # codes of up to 6 bits that the exporter rounded itself
    "carried": 1e-3,  # codes of a GPTQ or AWQ checkpoint, against that checkpoint
}


@dataclass(frozen=True)
class Bounds:
    """The largest value each metric may take, by the metric's name."""

    at_most: Mapping[str, float]


@dataclass(frozen=True)
class Verdict:
    """passed: every bound holds; lines: one for each bound, saying the metric, its value and the bound."""

    passed: bool
    lines: tuple[str, ...]


def default_bounds(change: Change) -> Bounds:
    """Bounds on `kl_to_parent` (nats a token) that an artifact meets when its export worked."""
    return Bounds({"kl_to_parent": KL_TO_PARENT[change]})


def prove(metrics: Mapping[str, float], bounds: Bounds) -> Verdict:
    """Hold measured figures against bounds. What was not measured, and what is not a number, proves nothing and fails."""
    lines, passed = [], True
    for name, bound in bounds.at_most.items():
        value = metrics.get(name, math.nan)
        holds = value <= bound
        passed &= holds
        measured = f"{value:.3g}" if name in metrics else "was not measured"
        lines.append(f"{'pass' if holds else 'FAIL'}  {name} {measured}, at most {bound:g}")
    return Verdict(passed, tuple(lines))
