"""`study:` of a recipe: the question that its sweep answers, the claims of the literature, and what a run must show to agree. Imports no torch.

A study is a recipe with a matrix and this block. Its settings are the places of the axis `x`, on each line of the axis `lines`; any other key of
the matrix but the seed is an error, because the results would be averaged over it unseen.
"""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator, model_validator

from compression.errors import PicklableError, nearest
from compression.settings import Settings
from flows.planning.source_map import KeyPath
from tasks.measurement.figures import BETTER

STAGE = "stage"  # as a key of an axis: the name of the result's stage
_SEED = "seed"
_MAY_BE_ZERO = ("kl_to_base", "over_refusal_rate")  # for a model that lost nothing; zero has no logarithm


def label(value: Any) -> str:
    """Write a value of the matrix for plots and tables: 1.0 and 1 are equal."""
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


Label = Annotated[str, BeforeValidator(lambda value: label(value) if isinstance(value, int | float) else value)]
Cells = Sequence[tuple[Mapping[str, Any], str]]  # for each result the cell's values by key, and the stage


class Axis(Settings):
    """What settings differ in, and its name."""

    keys: list[str] = Field(min_length=1, description="Keys of the matrix, or `stage`: the names of the stages at the ends of the graph.")
    label: str = Field(description="Name of the axis.")
    names: list[Label] = Field(
        default_factory=list,
        description="Names of its places, in the order of the matrix. Default: their values, with spaces between.",
    )

    @field_validator("names")
    @classmethod
    def _names_differ(cls, names: list[str]) -> list[str]:
        if len(set(names)) < len(names):
            raise ValueError("two places have one name")
        return names

    def value(self, values: Mapping[str, Any], stage: str) -> tuple[str, ...]:
        """Return the place of a result on this axis, as text."""
        return tuple(stage if key == STAGE else label(values[key]) for key in self.keys if key == STAGE or key in values)

    def places(self, cells: Cells) -> dict[tuple[str, ...], str]:
        """Return the name of every place, in the order of the cells."""
        places = list(dict.fromkeys(self.value(*cell) for cell in cells))
        return dict(zip(places, self.names or map(" ".join, places), strict=True))


class Published(Settings):
    """Figures of the paper: places on its x axis, and values of metrics there."""

    at: list[Label] = Field(min_length=2, description="Places on the paper's x axis.")
    values: dict[str, list[float]] = Field(min_length=1, description="Of each metric, as the paper measures it, the values there.")

    @model_validator(mode="after")
    def _same_length(self) -> "Published":
        for metric, values in self.values.items():
            if len(values) != len(self.at):
                raise ValueError(f"{metric} has {len(values)} values for {len(self.at)} places")
        return self


class Uncompressed(Settings):
    """The setting in which neither of two compressions is applied."""

    x: Label
    line: Label


class Claim(Settings):
    """A claim of the literature that a run can show or refute. Give `better` and `than`, or `compounds`."""

    says: str = Field(description="The claim in words.")
    metric: str = Field(description="The metric that decides. A comparison without it is undecided.")
    better: Label | None = Field(default=None, description="A place of either axis that is ahead ...")
    than: list[Label] = Field(default_factory=list, description="... of each of these places of the same axis.")
    at: list[Label] = Field(default_factory=list, description="Only at these places of the other axis. Default: at all.")
    within: float = Field(default=0.0, ge=0, description="How far `better` may be behind and the claim (`matches or exceeds`) still hold.")
    compounds: Uncompressed | None = Field(
        default=None,
        description="Away from this setting along both axes, the logarithm of the metric rises by more than the rises along each axis add up to. "
        "Not of one that may be 0, as `kl_to_base`.",
    )

    @model_validator(mode="after")
    def _one_kind(self) -> "Claim":
        if (self.better is None) == (self.compounds is None) or (self.better is None) != (not self.than):
            raise ValueError("a claim has either `better` and `than`, or `compounds`")
        if BETTER.get(self.metric) is None:
            raise ValueError(f"{self.metric} is not a metric of which one value is better than another: {', '.join(BETTER)}")
        if self.compounds and BETTER[self.metric] > 0:
            raise ValueError("`compounds` is judged by a metric that rises where a model gets worse, as perplexity does")
        return self


class Study(Settings):
    """The question that a sweep answers."""

    question: str = Field(description="In one line.")
    paper: str = Field(description="The paper that answered it: authors, title, arXiv id.")
    finding: str = Field(description="What it found, in words.")
    metrics: list[str] = Field(min_length=1, description="Metrics of the results that the table shows; the first two are drawn.")
    x: Axis = Field(description="What is varied.")
    lines: Axis | None = Field(default=None, description="What else is varied: one line of the plot each.")
    beside: list[str] = Field(default_factory=list, description="Further stages to show in the table.")
    published: Published | None = Field(default=None, description="Figures of the paper, drawn beside ours.")
    claims: list[Claim] = Field(default_factory=list, description="What must hold for a run to agree.")

    def axes(self) -> dict[str, Axis]:
        return {"x": self.x} | ({"lines": self.lines} if self.lines else {})


class StudyError(PicklableError):
    """A study that does not fit its recipe. `path`: of the key at fault."""

    def __init__(self, path: KeyPath, message: str):
        super().__init__(message)
        self.path = path


def check_study(study: Study, cells: Cells, stages: Iterable[str], seed: int) -> None:
    """Check that every result of the sweep has its place, settings share seeds, and claims name existing places.

    Args:
        study: The recipe's `study:`.
        cells: Each result's matrix values and stage.
        stages: Names of the recipe's stages.
        seed: The recipe's, for cells to which the matrix gives none.

    Raises:
        StudyError: With the key at fault.
    """
    if not cells:
        raise StudyError(("study",), "a study compares the cells of a matrix, and this recipe has none; `--set study=null` runs it without")
    keys = dict.fromkeys(key for values, _ in cells for key in values)
    for name, axis in study.axes().items():
        for key in axis.keys:
            if key not in (*keys, STAGE):
                raise StudyError(("study", name, "keys"), f"the matrix has no {key!r}; keys: {', '.join([*keys, STAGE])}")
        places = list(dict.fromkeys(axis.value(*cell) for cell in cells))
        if axis.names and len(axis.names) != len(places):
            listed = ", ".join(" ".join(place) for place in places)
            raise StudyError(("study", name, "names"), f"{len(axis.names)} names for {len(places)} places: {listed}")
    seeds: dict[tuple[tuple[str, ...], ...], list[int]] = {}  # of each setting
    for values, stage in cells:
        used = seeds.setdefault(tuple(axis.value(values, stage) for axis in study.axes().values()), [])
        if values.get(_SEED, seed) in used:
            raise StudyError(
                ("study", "x", "keys"), f"two results stand at one place ({stage}, {dict(values)}): an axis must name what differs"
            )
        used.append(values.get(_SEED, seed))
    _check_seeds(seeds)
    for number, name in enumerate(study.beside):
        if name not in stages:
            raise StudyError(("study", "beside", number), f"there is no stage {name!r}; stages: {', '.join(stages)}")
    _check_claims(study, cells)


def _check_seeds(seeds: Mapping[tuple[tuple[str, ...], ...], Sequence[int]]) -> None:
    """Refuse settings that share no seed: a difference of seeds would look like one of settings."""
    if not set.intersection(*map(set, seeds.values())):
        examples = "; ".join(
            f"{' '.join(part for place in places for part in place)} has {used}" for places, used in list(seeds.items())[:3]
        )
        raise StudyError(
            ("matrix", _SEED),
            f"a study compares settings seed by seed, and no seed is there for all of them: {examples}; seeds cannot go side by side (`zip`)",
        )


def check_metrics(study: Study, measured: Iterable[str]) -> None:
    """Raise StudyError for a column or a claim of a metric that no result of the sweep will have. `measured` names may have a `*`."""
    names = list(measured)
    needed: list[tuple[KeyPath, str]] = [(("study", "metrics", number), metric) for number, metric in enumerate(study.metrics)]
    needed += [(("study", "claims", number, "metric"), claim.metric) for number, claim in enumerate(study.claims)]
    for path, metric in needed:
        if not any(fnmatchcase(metric, name) for name in names):
            plain = [name for name in names if not name.endswith(("_low", "_high"))]
            raise StudyError(path, f"no result of the sweep has a metric {metric!r}{nearest(metric, plain)}; they have {', '.join(plain)}")


def _check_claims(study: Study, cells: Cells) -> None:
    places = {name: list(axis.places(cells).values()) for name, axis in study.axes().items()}
    for number, claim in enumerate(study.claims):
        path: KeyPath = ("study", "claims", number)
        if claim.compounds:
            if claim.metric in _MAY_BE_ZERO:
                raise StudyError(
                    (*path, "metric"), f"`compounds` compares logarithms, and {claim.metric} may be 0 where nothing is lost; take another"
                )
            if "lines" not in places:
                raise StudyError((*path, "compounds"), "it compares along two axes, and this study has no `lines`")
            wanted = {"x": [claim.compounds.x], "lines": [claim.compounds.line]}
        else:
            compared = axis_of(claim, places)
            wanted = {name: claim.at for name in places if name != compared} | {compared: [claim.better or "", *claim.than]}
            if claim.at and len(places) == 1:
                raise StudyError((*path, "at"), "this study has one axis only")
        for name, labels in wanted.items():
            for place in labels:
                if place not in places[name]:
                    raise StudyError(
                        path,
                        f"{place!r} is not a place of {name}; places: {', '.join(places[name])}; `--set study=null` runs the recipe without",
                    )


def axis_of(claim: Claim, places: Mapping[str, Sequence[str]]) -> str:
    """Return the axis that `better` is on: x, unless only the lines have it."""
    return "lines" if "lines" in places and claim.better in places["lines"] and claim.better not in places["x"] else "x"
