"""Build a recipe's graph: entries of `stages:` become nodes in topological order, once for each cell of the matrix that reaches them.

A stage's entry holds its kind (`uses`), the kind's parameters, and the settings of its execution (`needs`, `retries`, `timeout`, `bounds`). Only
the parameters belong to its identity.
"""

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from compression.errors import EdgepressError, nearest
from flows.planning.matrix import SEED, Cell, key_of
from flows.planning.nodes import BASE, Branch, Node, StageExecution
from flows.planning.recipe_errors import recipe_error
from flows.planning.source_map import KeyPath, SourceMap, shortened
from tasks.measurement.gate_presets import StageGates, gate_key
from tasks.measurement.gates import Bound
from tasks.stage import Stage, stage_kinds

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")
_MAX_NAME = 80  # of a recipe or a stage: file names add a run's number or the values of a sweep's cell, and end at 255
_RUN_FILES = ("run.json", "report.html")  # in `outputs/<recipe>/`, where each stage has a link


class _Entry(BaseModel):
    """A stage's entry as parsed, with names of the recipe as its inputs. `text` is equal for equal entries."""

    model_config = ConfigDict(frozen=True)

    name: str
    stage: Stage
    execution: StageExecution
    parent: str
    text: str

    @property
    def inputs(self) -> dict[str, str]:
        return {"parent": self.parent, **self.stage.other_inputs()}


def build_graph(
    stages: Mapping[str, Any],
    gates: Mapping[str, StageGates],
    seed: int,
    cells: Iterable[Cell],
    source: SourceMap,
) -> tuple[list[Node], list[Branch]]:
    """Return the graph in topological order, and each cell's branch of it.

    A stage has one copy for each choice of the values that reach it, directly or through a stage it reads. Cells share the rest.

    Raises:
        EdgepressError: With file, line and key: an entry is not a stage, a dependency is unknown, stages form a cycle, or two cells are the same.
    """
    copies: dict[str, _Copy] = {}
    branches: list[Branch] = []
    parsed: dict[tuple[str, ...], _Entry] = {}
    seen: dict[tuple[str, ...], Cell] = {}
    names = list(stages)
    for cell in cells:
        entries = [
            _cell_entry(name, stages[name], previous, cell, parsed, source) for name, previous in zip(names, [BASE, *names], strict=False)
        ]
        ordered = _topological(entries, source.remap(_redirects(cell, cell.values)))
        cell_seed = cell.values[SEED].value if SEED in cell.values else seed
        other = seen.setdefault((str(cell_seed), *(entry.text for entry in entries)), cell)
        if other is not cell:
            raise source.error(_place_of_difference(cell, other), f"the cells {cell.name} and {other.name} are the same")
        branches.append(_add_branch(cell, ordered, cell_seed, copies))
    followed = {name for copy in copies.values() for name in copy.inputs}
    return [copy.node(gates, leaf=name not in followed) for name, copy in copies.items()], branches


def invalid_name_reason(name: str) -> str:
    """Return why a recipe or a stage cannot have this name, after which files are named; empty where it can."""
    if not _NAME.fullmatch(name):
        return "is not a file name in lower case (letters, digits, - _ .)"
    if name in _RUN_FILES:
        return "is the name of a file that a run writes next to its results"
    return f"is longer than {_MAX_NAME} characters" if len(name) > _MAX_NAME else ""


def _place_of_difference(cell: Cell, other: Cell) -> KeyPath:
    """Where the recipe gives a value of `cell` that does not come from the same place as that of `other`."""
    places = (v.place for path, v in cell.values.items() if path not in other.values or other.values[path].place != v.place)
    return next(places, ("matrix",))


def _add_branch(cell: Cell, ordered: list[_Entry], seed: int, copies: dict[str, "_Copy"]) -> Branch:
    """Add the copies of this cell that no earlier cell needed."""
    needed = {name for entry in ordered for name in entry.inputs.values()}
    names: dict[str, str] = {BASE: BASE}
    reached: dict[str, set[KeyPath]] = {BASE: set()}
    for entry in ordered:
        direct = {path for path in cell.values if path == SEED or path[1] == entry.name}
        reached[entry.name] = direct.union(*(reached[name] for name in entry.inputs.values()))
        paths = [path for path in cell.values if path in reached[entry.name]]
        name = names[entry.name] = f"{entry.name}@{cell.label(paths)}" if paths else entry.name
        if name not in copies:
            copies[name] = _Copy(entry, names, seed, _redirects(cell, paths))
    leaves = tuple(entry.name for entry in ordered if entry.name not in needed and reached[entry.name])
    stages = {name: copy for name, copy in names.items() if name != BASE}
    return Branch(name=cell.name, values={key_of(path): value.value for path, value in cell.values.items()}, stages=stages, leaves=leaves)


@dataclass(frozen=True)
class _Copy:
    """An entry in the cell that needed it first. `names`: from names in the recipe to those of the cell's copies."""

    entry: _Entry
    names: Mapping[str, str]
    seed: int
    redirects: Mapping[KeyPath, KeyPath]

    @property
    def inputs(self) -> list[str]:
        return [self.names[name] for name in self.entry.inputs.values()]

    def node(self, gates: Mapping[str, StageGates], *, leaf: bool) -> Node:
        """Refer to the copies of its cell in inputs, gates and bounds. `leaf`: no stage follows it in any cell."""
        entry = self.entry
        key = gate_key(gates, entry.name, entry.stage.uses, leaf)
        others = {role: self.names[name] for role, name in entry.stage.other_inputs().items()}
        return Node(
            name=self.names[entry.name],
            stage=entry.stage.model_copy(update=others) if others else entry.stage,
            parent=self.names[entry.parent],
            execution=entry.execution.model_copy(update={"bounds": self._renamed(entry.execution.bounds)}),
            origin=entry.name,
            seed=self.seed,
            gates=self._renamed(gates[key]) if key else {},
            gated_by=key or entry.name,
            redirects=self.redirects,
        )

    def _renamed(self, bounds: Mapping[str, Bound]) -> dict[str, Bound]:
        return {
            metric: bound.model_copy(update={"relative_to": self.names.get(bound.relative_to, bound.relative_to)})
            for metric, bound in bounds.items()
        }


def _redirects(cell: Cell, paths: Iterable[KeyPath]) -> dict[KeyPath, KeyPath]:
    return {path: cell.values[path].place for path in paths}


def _cell_entry(name: str, entry: Any, previous: str, cell: Cell, parsed: dict[tuple[str, ...], _Entry], source: SourceMap) -> _Entry:
    """Set the cell's values in an entry; parse the entry once for each choice of them."""
    paths = [path for path in cell.values if path[:2] == ("stages", name)]
    key = (name, *(f"{path} {cell.values[path].text}" for path in paths))
    if key not in parsed:
        remapped = source.remap(_redirects(cell, paths))
        changed = deepcopy(entry) if paths else entry
        for path in paths:
            _set_value(changed, path, cell.values[path].value, remapped)
        parsed[key] = _parse_entry(name, changed, previous, remapped)
    return parsed[key]


def _set_value(entry: Any, path: KeyPath, value: Any, source: SourceMap) -> None:
    for depth, key in enumerate(path[2:-1], 2):
        entry = entry.setdefault(key, {}) if isinstance(entry, dict) else entry
        if not isinstance(entry, dict):
            raise source.error(path, f"{key_of(path[: depth + 1])} is not a mapping in the recipe")
    if isinstance(entry, dict):
        entry[path[-1]] = value


def _parse_entry(name: str, entry: Any, previous: str, source: SourceMap) -> _Entry:
    path: KeyPath = ("stages", name)
    if (reason := invalid_name_reason(name)) or name == BASE:
        raise EdgepressError(
            f"{source.position(path)}: a stage cannot be called {shortened(name)!r}: it {reason or 'is the name of the base model'}"
        )
    kinds = stage_kinds()
    if not isinstance(entry, dict) or "uses" not in entry:
        raise source.error(path, f"a stage needs `uses`, one of {', '.join(kinds)}")
    uses = str(entry["uses"])
    if uses not in kinds:
        raise source.error((*path, "uses"), f"there is no stage kind {entry['uses']!r}{nearest(uses, kinds)}; kinds: {', '.join(kinds)}")
    settings = {key: value for key, value in entry.items() if key in StageExecution.model_fields}
    parameters = {key: value for key, value in entry.items() if key not in settings}
    try:
        stage, execution = kinds[uses].model_validate(parameters), StageExecution.model_validate(settings)
    except ValidationError as error:
        raise recipe_error(error, source, path, kinds[uses]) from None
    parent = execution.needs or previous
    return _Entry(name=name, stage=stage, parent=parent, execution=execution, text=f"{name} {parent} {stage.model_dump_json()}")


def _topological(entries: list[_Entry], source: SourceMap) -> list[_Entry]:
    """Order the entries, stable in the file's order. Raises EdgepressError for an unknown dependency or a cycle."""
    names = {entry.name for entry in entries}
    for entry in entries:
        for role, needed in entry.inputs.items():
            if needed not in names | {BASE}:
                key: KeyPath = ("stages", entry.name, "needs" if role == "parent" else role)
                raise source.error(
                    key, f"there is no stage {needed!r}{nearest(needed, [*names, BASE])}; stages: {', '.join([BASE, *names])}"
                )
    done, ordered, waiting = {BASE}, [], list(entries)
    while waiting:
        ready = next((entry for entry in waiting if done.issuperset(entry.inputs.values())), None)
        if ready is None:
            cycle = ", ".join(entry.name for entry in waiting)
            raise source.error(("stages", waiting[0].name, "needs"), f"the stages {cycle} wait for each other (a cycle)")
        waiting.remove(ready)
        ordered.append(ready)
        done.add(ready.name)
    return ordered
