"""The graph of a recipe: entries of `stages:` become nodes in topological order, once for each cell of the matrix that reaches them.

A stage's entry holds its kind (`uses`), the kind's parameters, and how it is executed (`needs`, `retries`, `timeout`, `bounds`). Only the
parameters belong to its identity.
"""

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from compression.errors import EdgepressError
from compression.settings import Settings
from flows.planning.matrix import SEED, Cell, key_of
from flows.planning.source_map import KeyPath, SourceMap, kind_of, nearest, shortened
from tasks.measurement.gate_presets import StageGates, gate_key
from tasks.measurement.gates import Bound
from tasks.stage import Stage, stage_kinds

NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")
LONGEST_NAME = 80  # of a recipe or a stage: names of files hold it beside a run's number or the values of a sweep's cell, and end at 255
BASE = "base"
OURS = ("run.json", "report.html")  # in `outputs/<recipe>/`, where each stage has a link
_LIST = "this must be a list: [one, another]"
_MESSAGES = {"missing": "this key is missing", "tuple_type": _LIST, "list_type": _LIST}  # in place of pydantic's
_MANY = 3  # unknown keys of one mapping
_ALTERNATIVE = re.compile(r"[A-Z]\w*Source|bool|(literal|list)\[.*\]")  # in a path of pydantic: one of several kinds


class StageExecution(Settings):
    """How a stage is executed; outside its identity."""

    needs: str | None = Field(
        default=None, description="The stage whose checkpoint this one takes, or `base`. Default: the stage before it in the file."
    )
    retries: int = Field(
        default=1, ge=0, le=10, description="How often a stage whose process was lost (killed, out of memory) is started again."
    )
    timeout: float | None = Field(
        default=None, gt=0, description="Seconds after which the stage is stopped, for good: `retries` does not start it again."
    )
    job_variables: dict[str, Any] = Field(
        default_factory=dict,
        description="With `runner: prefect`: variables of the work pool for this stage's job, as a GPU or memory request of kubernetes or docker.",
    )
    bounds: dict[str, Bound] = Field(
        default_factory=dict,
        description="Bounds of an export's proof by metric, in place of the defaults of its format (kl_to_parent: {max: 0.2}).",
    )


class Node(BaseModel):
    """A stage of the graph: what it computes and how it is executed.

    name    its own; that of a copy says the values that reach it: `gptq@temperature=2,bits=4`
    origin  its name in the recipe
    seed    the recipe's, or the cell's
    gates   by metric; `relative_to` names stages of the graph. `gated_by` is the key of the recipe that gives them
    moved   its values that the matrix gives, and where
    """

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    name: str
    stage: Stage
    parent: str
    execution: StageExecution
    origin: str
    seed: int
    gates: Mapping[str, Bound]
    gated_by: str
    moved: Mapping[KeyPath, KeyPath]

    @property
    def inputs(self) -> dict[str, str]:
        """Names by role."""
        return {"parent": self.parent, **self.stage.other_inputs()}


class Branch(BaseModel):
    """A cell of the matrix in the graph.

    values  by key: {"distill.temperature": 2}
    stages  the stages this cell is computed by, from their names in the recipe to their names in the graph
    leaves  names in the recipe of the stages that nothing follows and that a value of the cell reaches
    """

    model_config = ConfigDict(frozen=True)

    name: str
    values: Mapping[str, Any]
    stages: Mapping[str, str]
    leaves: tuple[str, ...]


class _Entry(BaseModel):
    """A stage's entry as parsed, before its inputs are known to be copies. `text` is equal for equal entries."""

    model_config = ConfigDict(frozen=True)

    name: str
    stage: Stage
    execution: StageExecution
    parent: str
    text: str

    @property
    def inputs(self) -> dict[str, str]:
        return {"parent": self.parent, **self.stage.other_inputs()}


def expand(
    stages: Mapping[str, Any], gates: Mapping[str, StageGates], seed: int, cells: Iterable[Cell], source: SourceMap
) -> tuple[list[Node], list[Branch]]:
    """The graph in topological order, and each cell's branch of it.

    A stage is there once for each choice of the values that reach it: its own, and those of every stage it reads. Cells share the rest.
    Raises EdgepressError with file, line and key: an entry that is no stage, an unknown dependency, a cycle, two cells that are the same.
    """
    copies: dict[str, _Copy] = {}
    branches: list[Branch] = []
    parsed: dict[tuple[str, ...], _Entry] = {}
    known: dict[tuple[str, ...], Cell] = {}
    for cell in cells:
        entries = [_with_values(name, entry, previous, cell, parsed, source) for name, entry, previous in _with_previous(stages)]
        ordered = _in_order(entries, source.remap(_moved(cell, cell.values)))
        cell_seed = cell.values[SEED].value if SEED in cell.values else seed
        other = known.setdefault((str(cell_seed), *(entry.text for entry in entries)), cell)
        if other is not cell:
            raise source.error(_difference(cell, other), f"the cells {cell.name} and {other.name} are the same")
        branches.append(_branch(cell, ordered, cell_seed, copies))
    read = {name for copy in copies.values() for name in copy.inputs}
    return [copy.node(gates, leaf=name not in read) for name, copy in copies.items()], branches


def _difference(cell: Cell, other: Cell) -> KeyPath:
    """Where the recipe gives a value of `cell` that is not from the same place as that of `other`."""
    places = (v.place for path, v in cell.values.items() if path not in other.values or other.values[path].place != v.place)
    return next(places, ("matrix",))


def _branch(cell: Cell, ordered: list[_Entry], seed: int, copies: dict[str, "_Copy"]) -> Branch:
    """Add the copies of this cell that no cell before it needed."""
    needed = {name for entry in ordered for name in entry.inputs.values()}
    names: dict[str, str] = {BASE: BASE}
    reached: dict[str, set[KeyPath]] = {BASE: set()}
    for entry in ordered:
        own = {path for path in cell.values if path == SEED or path[1] == entry.name}
        reached[entry.name] = own.union(*(reached[name] for name in entry.inputs.values()))
        paths = [path for path in cell.values if path in reached[entry.name]]
        name = names[entry.name] = f"{entry.name}@{cell.label(paths)}" if paths else entry.name
        if name not in copies:
            copies[name] = _Copy(entry, names, seed, _moved(cell, paths))
    leaves = tuple(entry.name for entry in ordered if entry.name not in needed and reached[entry.name])
    stages = {name: copy for name, copy in names.items() if name != BASE}
    return Branch(name=cell.name, values={key_of(path): value.value for path, value in cell.values.items()}, stages=stages, leaves=leaves)


@dataclass(frozen=True)
class _Copy:
    """An entry as the cell that needed it first has it. `names`: from names in the recipe to those of the cell's copies."""

    entry: _Entry
    names: Mapping[str, str]
    seed: int
    moved: Mapping[KeyPath, KeyPath]

    @property
    def inputs(self) -> list[str]:
        return [self.names[name] for name in self.entry.inputs.values()]

    def node(self, gates: Mapping[str, StageGates], *, leaf: bool) -> Node:
        """What reads, and is bounded relative to, the copies of its cell. `leaf`: nothing follows it, in no cell."""
        entry = self.entry
        key = gate_key(gates, entry.name, entry.stage.uses, leaf)
        others = {role: self.names[name] for role, name in entry.stage.other_inputs().items()}
        execution = entry.execution.model_copy(update={"bounds": self._renamed(entry.execution.bounds)})
        return Node(
            name=self.names[entry.name], stage=entry.stage.model_copy(update=others) if others else entry.stage,
            parent=self.names[entry.parent], execution=execution, origin=entry.name, seed=self.seed,
            gates=self._renamed(gates[key]) if key else {}, gated_by=key or entry.name, moved=self.moved,
        )  # fmt: skip

    def _renamed(self, bounds: Mapping[str, Bound]) -> dict[str, Bound]:
        return {
            metric: bound.model_copy(update={"relative_to": self.names.get(bound.relative_to, bound.relative_to)})
            for metric, bound in bounds.items()
        }


def _moved(cell: Cell, paths: Iterable[KeyPath]) -> dict[KeyPath, KeyPath]:
    return {path: cell.values[path].place for path in paths}


def _with_previous(stages: Mapping[str, Any]) -> list[tuple[str, Any, str]]:
    names = list(stages)
    return [(name, stages[name], names[i - 1] if i else BASE) for i, name in enumerate(names)]


def _with_values(name: str, entry: Any, previous: str, cell: Cell, parsed: dict[tuple[str, ...], _Entry], source: SourceMap) -> _Entry:
    """The entry with the cell's values of its own parameters put in; parsed once for each choice of them."""
    paths = [path for path in cell.values if path[:2] == ("stages", name)]
    key = (name, *(f"{path} {cell.values[path].text}" for path in paths))
    if key not in parsed:
        there = source.remap(_moved(cell, paths))
        changed = deepcopy(entry) if paths else entry
        for path in paths:
            _put(changed, path, cell.values[path].value, there)
        parsed[key] = _parse(name, changed, previous, there)
    return parsed[key]


def _put(entry: Any, path: KeyPath, value: Any, source: SourceMap) -> None:
    for depth, key in enumerate(path[2:-1], 2):
        entry = entry.setdefault(key, {}) if isinstance(entry, dict) else entry
        if not isinstance(entry, dict):
            raise source.error(path, f"{key_of(path[: depth + 1])} is no mapping in the recipe")
    if isinstance(entry, dict):
        entry[path[-1]] = value


def _parse(name: str, entry: Any, previous: str, source: SourceMap) -> _Entry:
    where: KeyPath = ("stages", name)
    if (problem := name_problem(name)) or name == BASE:
        raise EdgepressError(
            f"{source.where(where)}: a stage cannot be called {shortened(name)!r}: it {problem or 'is the name of the base model'}"
        )
    if not isinstance(entry, dict) or "uses" not in entry:
        raise source.error(where, f"a stage needs `uses`, one of {', '.join(stage_kinds())}")
    kind = stage_kinds().get(str(entry["uses"]))
    if kind is None:
        raise source.error(
            (*where, "uses"),
            f"there is no stage kind {entry['uses']!r}{nearest(str(entry['uses']), list(stage_kinds()))}; kinds: {', '.join(stage_kinds())}",
        )
    parameters = {key: value for key, value in entry.items() if key not in StageExecution.model_fields}
    settings = {key: value for key, value in entry.items() if key in StageExecution.model_fields}
    try:
        stage, execution = kind.model_validate(parameters), StageExecution.model_validate(settings)
    except ValidationError as error:
        raise recipe_error(error, source, where, kind) from None
    parent = execution.needs or previous
    return _Entry(name=name, stage=stage, parent=parent, execution=execution, text=f"{name} {parent} {stage.model_dump_json()}")


def name_problem(name: str) -> str:
    """Why a recipe or a stage cannot have a name, which is that of a file; empty where it can."""
    if not NAME.fullmatch(name):
        return "is not a file name in lower case (letters, digits, - _ .)"
    if name in OURS:
        return "is the name of a file that a run writes beside its stages"
    return f"is longer than {LONGEST_NAME} characters" if len(name) > LONGEST_NAME else ""


def _in_order(entries: list[_Entry], source: SourceMap) -> list[_Entry]:
    """Topological order, stable in the file's order. Raises for an unknown dependency or a cycle."""
    names = {entry.name for entry in entries}
    for entry in entries:
        for role, needed in entry.inputs.items():
            if needed not in names | {BASE}:
                key: KeyPath = ("stages", entry.name, "needs" if role == "parent" else role)
                raise source.error(
                    key, f"there is no stage {needed!r}{nearest(needed, [*names, BASE])}; stages: {', '.join([BASE, *names])}"
                )
    done, order, waiting = {BASE}, [], list(entries)
    while waiting:
        ready = next((e for e in waiting if done.issuperset(e.inputs.values())), None)
        if ready is None:
            cycle = ", ".join(e.name for e in waiting)
            raise source.error(("stages", waiting[0].name, "needs"), f"the stages {cycle} wait for each other (a cycle)")
        waiting.remove(ready)
        order.append(ready)
        done.add(ready.name)
    return order


def recipe_error(error: ValidationError, source: SourceMap, prefix: KeyPath, model: type[BaseModel]) -> EdgepressError:
    """Pydantic's findings as lines of `file:line: key: what is wrong`."""
    found: dict[KeyPath, list[str]] = {}
    unknown: dict[KeyPath, list[KeyPath]] = {}  # keys that there are not, by the mapping that has them
    for finding in error.errors(include_url=False):
        place = tuple(part for part in finding["loc"] if part != "[key]" and not _ALTERNATIVE.fullmatch(str(part)))
        message = _message(finding, place, model)
        if finding["type"] == "extra_forbidden" and place not in found:
            unknown.setdefault(place[:-1], []).append(place)
        messages = found.setdefault(place, [])
        messages.append(f"or {message[0].lower()}{message[1:]}" if place != finding["loc"] and messages else message)
    for first, *others in unknown.values():
        if len(others) >= _MANY:  # one message for all of them
            names = ", ".join(str(place[-1]) for place in (first, *others[: _MANY - 1]))
            found[first] = [
                f"there are no such keys: {names} and {1 + len(others) - _MANY} more; keys: {', '.join(_keys_at(model, first[:-1]))}"
            ]
            for place in others:
                del found[place]
    told_below = {place[:length] for place in found for length in range(len(place))}  # what is wrong there is more to the point
    return EdgepressError(
        "\n".join(str(source.error((*prefix, *place), ", ".join(m))) for place, m in found.items() if place not in told_below)
    )


def _message(finding: ErrorDetails, place: KeyPath, model: type[BaseModel]) -> str:
    kind, read = finding["type"], kind_of(finding["input"])
    if kind == "extra_forbidden":
        return _unknown_key(str(place[-1]), place[:-1], model)
    if kind in _MESSAGES:
        return _MESSAGES[kind]
    if kind in ("dict_type", "model_type"):
        known = _keys_at(model, place)
        return f"this must be a mapping of {', '.join(known)}" if known else "this must be a mapping: {key: value}"
    if kind == "invalid_key" or finding["loc"][-1] == "[key]":
        return f"the key {finding['input']} is a {read} in YAML, and a text is needed; put quotes round it: '{finding['input']}'"
    message = finding["msg"].removeprefix("Value error, ")
    if kind in ("string_type", "literal_error") and read and not (kind == "literal_error" and read == "number"):
        return f"{message}; in YAML this is a {read}, and quotes make it a text"
    return message


def _unknown_key(key: str, path: KeyPath, model: type[BaseModel]) -> str:
    found = _model_at(model, path)
    if found is not None and issubclass(found, Settings) and key in found.former_names:
        return f"this key is called {found.former_names[key]} now"
    known = _keys_at(model, path)
    return "there is no such key" + (f"{nearest(key, known)}; keys: {', '.join(known)}" if known else "")


def _keys_at(model: type[BaseModel], path: KeyPath) -> list[str]:
    """The keys that a place within a model may have; none where it is not a model."""
    found = _model_at(model, path)
    stage = found is not None and issubclass(found, Stage)
    return [*(found.model_fields if found else ()), *(StageExecution.model_fields if stage else ())]


def _model_at(model: type[BaseModel], path: KeyPath) -> type[BaseModel] | None:
    """The model that describes a place within another one."""
    kind: Any = model
    for key in path:
        if found := _model_of(kind):
            kind = found.model_fields[str(key)].annotation if key in found.model_fields else None
        else:
            kind = (get_args(kind) or (None,))[-1]  # the values of a mapping
    return _model_of(kind)


def _model_of(kind: Any) -> type[BaseModel] | None:
    """The model that an annotation names; it may be optional."""
    known = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return next((each for each in known if isinstance(each, type) and issubclass(each, BaseModel)), None)
