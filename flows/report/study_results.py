"""What a study's run showed: its settings with their spread over seeds, and each claim with paired differences. Imports no torch."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from flows.planning.study import Claim, Study, axis_of
from tasks.measurement.figures import BETTER

AGREES, DISAGREES, UNDECIDED = "agrees", "disagrees", "undecided"
Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Setting:
    """A place of both axes (`line` is empty where the study has one), and the metrics of each seed's result."""

    x: str
    line: str
    seeds: Mapping[int, Metrics]

    def values(self, metric: str) -> list[float]:
        return [metrics[metric] for metrics in self.seeds.values() if metric in metrics]


@dataclass(frozen=True)
class Difference:
    """How far a claim holds at one setting, seed by seed: above 0 it does. Without values, what it compares was not measured.

    low, high  ends of the 95% interval of the mean over seeds, by Student's t; none of a single seed. It tells what another draw of the
               training rows would change, not what another choice of test questions would
    """

    what: str
    values: tuple[float, ...]
    within: float = 0.0

    @property
    def mean(self) -> float:
        """Not of a difference without values."""
        return fmean(self.values)

    @property
    def reach(self) -> float:
        """Half the interval's width; infinite for a single seed."""
        from scipy.special import stdtrit

        count = len(self.values)
        return float(stdtrit(count - 1, 0.975)) * stdev(self.values) / math.sqrt(count) if count > 1 else math.inf

    @property
    def outcome(self) -> str:
        if not self.values:
            return UNDECIDED
        if self.mean - self.reach > -self.within:
            return AGREES
        return DISAGREES if self.mean + self.reach < -self.within else UNDECIDED


@dataclass(frozen=True)
class JudgedClaim:
    """A claim, and its differences. It agrees where all of them do, and disagrees where one does."""

    claim: Claim
    differences: tuple[Difference, ...]

    @property
    def outcome(self) -> str:
        found = {difference.outcome for difference in self.differences}
        return DISAGREES if DISAGREES in found else AGREES if found == {AGREES} else UNDECIDED


@dataclass(frozen=True)
class Results:
    """Everything a study's table and plot show. `beside` are further models: the base and the stages named beside, by what they are called."""

    study: Study
    settings: tuple[Setting, ...]
    beside: Mapping[str, Sequence[Metrics]]
    judged: tuple[JudgedClaim, ...]

    @property
    def xs(self) -> list[str]:
        return list(dict.fromkeys(setting.x for setting in self.settings))

    @property
    def lines(self) -> list[str]:
        return list(dict.fromkeys(setting.line for setting in self.settings))


def results(study: Study, summary: dict[str, Any]) -> Results:
    """The results of a finished run of the whole recipe; `summary` is what flows/run/pipeline.py writes into run.json."""
    settings = _settings(study, summary)
    judged = tuple(JudgedClaim(claim, tuple(_differences(claim, settings))) for claim in study.claims)
    return Results(study, settings, _beside(study, summary["rows"]), judged)


def _settings(study: Study, summary: dict[str, Any]) -> tuple[Setting, ...]:
    rows = {row["stage"]: row for row in summary["rows"]}
    cells = [(cell["values"], leaf, rows[name]["metrics"]) for cell in summary["sweep"]["cells"] for leaf, name in cell["leaves"].items()]
    places = {name: axis.places([cell[:2] for cell in cells]) for name, axis in study.axes().items()}
    found: dict[tuple[str, str], dict[int, Metrics]] = {}
    for values, leaf, metrics in cells:
        x = places["x"][study.x.value(values, leaf)]
        line = places["lines"][study.lines.value(values, leaf)] if study.lines else ""
        found.setdefault((x, line), {})[values.get("seed", summary["recipe"]["seed"])] = metrics
    return tuple(Setting(x, line, seeds) for (x, line), seeds in found.items())


def _beside(study: Study, rows: Sequence[dict[str, Any]]) -> dict[str, list[Metrics]]:
    """The base, and copies of the stages beside; those that differ in their seed alone are one."""
    found: dict[str, list[Metrics]] = {}
    for row in rows:
        origin, _, values = row["stage"].partition("@")
        if row["stage"] == rows[0]["stage"] or origin in study.beside:
            others = re.sub(r"(^|,)seed=\d+", "", values).strip(",")
            found.setdefault(f"{origin} {others}".strip(), []).append(row["metrics"])
    return found


def _differences(claim: Claim, settings: Sequence[Setting]) -> list[Difference]:
    by_place = {(setting.x, setting.line): setting for setting in settings}
    if claim.compounds:
        return _compounded(claim, by_place)
    axis = axis_of(claim, {"x": [x for x, _ in by_place], "lines": [line for _, line in by_place]})
    found = []
    for other in claim.than:
        for ahead in settings:
            mine, elsewhere = (ahead.x, ahead.line) if axis == "x" else (ahead.line, ahead.x)
            behind = by_place.get((other, elsewhere) if axis == "x" else (elsewhere, other))
            if mine == claim.better and behind is not None and (not claim.at or elsewhere in claim.at):
                values = [BETTER[claim.metric] * (a - b) for a, b in _paired(claim.metric, ahead, behind)]
                where = f" at {elsewhere}" if elsewhere else ""
                found.append(Difference(f"{claim.better} against {other}{where}", tuple(values), claim.within))
    return found


def _compounded(claim: Claim, by_place: Mapping[tuple[str, str], Setting]) -> list[Difference]:
    """log m(x, line) - log m(x, line0) - log m(x0, line) + log m(x0, line0), for every x and line that are not the reference's."""
    assert claim.compounds
    x0, line0 = claim.compounds.x, claim.compounds.line
    found = []
    for x, line in by_place:
        corners = [(x, line), (x, line0), (x0, line), (x0, line0)]
        if len(set(corners)) == 4 and all(corner in by_place for corner in corners):
            measured = _paired(claim.metric, *(by_place[corner] for corner in corners))
            values = [math.log(both) - math.log(one) - math.log(other) + math.log(none) for both, one, other, none in measured]
            found.append(Difference(f"{x} with {line}", tuple(values)))
    return found


def _paired(metric: str, *settings: Setting) -> list[tuple[float, ...]]:
    """The metric's values in all settings, for each seed in which all of them have measured it."""
    shared = [seed for seed in settings[0].seeds if all(metric in setting.seeds.get(seed, {}) for setting in settings)]
    return [tuple(setting.seeds[seed][metric] for setting in settings) for seed in shared]
