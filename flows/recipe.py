"""The recipe: YAML -> pydantic, validated whole. Every mistake is told with file, line, key and what would be right.

A stage's entry holds its kind (`uses`), the kind's parameters, and how it is executed (`needs`, `retries`, `timeout`, `bounds`). Only the
parameters belong to its identity.
"""

import difflib
import operator
import re
from functools import lru_cache, reduce
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model

from compression.data import DataSpec
from compression.errors import EdgepressError
from flows.yaml_lines import KeyPath, Located, read_yaml
from tasks.gates import Bound
from tasks.stage import Stage, stage_kinds

NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")
BASE = "base"


class Execution(BaseModel):
    """How a stage is executed; outside its identity."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    needs: str | None = Field(
        default=None, description="The stage whose checkpoint this one takes, or `base`. Default: the stage before it in the file."
    )
    retries: int = Field(
        default=1, ge=0, le=10, description="How often a stage whose process was lost (killed, out of memory) is started again."
    )
    timeout: float | None = Field(default=None, gt=0, description="Seconds after which the stage is stopped.")
    bounds: dict[str, Bound] = Field(
        default_factory=dict,
        description="Bounds of an export's proof by metric, in place of the defaults of its format (kl_to_parent: {max: 0.2}).",
    )


class Runner(BaseModel):
    """How the whole graph is executed; outside every identity."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cores: int | None = Field(default=None, ge=1, description="Cores that stages may use together. Default: all of the machine.")


class ModelSource(BaseModel):
    """Where the base model comes from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(description="`embedded`, a local directory, or a hub id (organisation/name).")
    revision: str | None = Field(default=None, description="Commit, tag or branch of a hub model; pinned to the commit in the identity.")
    license: str | None = Field(default=None, description="Licence of the model, where its model card does not say it.")


class Recipe(BaseModel):
    """A whole recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(default="", description="Name of the pipeline; default: the file's name.")
    model: ModelSource = Field(description="The base model: `embedded`, a directory, a hub id, or {path:, revision:}.")
    data: DataSpec = Field(description="Text and questions to calibrate, train and measure with: `embedded` or a mapping.")
    seed: int = Field(default=0, ge=0, description="Every random draw derives from it.")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(default="auto", description="Where stages run; its type belongs to the identity.")
    threads: int = Field(
        default=2, ge=1, le=256, description="Threads of each stage: fixed, because sums differ in bytes with their number."
    )
    stages: dict[str, Any] = Field(min_length=1, description="The graph: name -> {uses: kind, ...}.")
    gates: dict[str, dict[str, Bound]] = Field(
        default_factory=dict, description="Bounds by stage and metric; a broken one stops what follows."
    )
    execution: Runner = Field(default_factory=Runner, description="How it is run.")


class Node(BaseModel):
    """A stage of a recipe: what it computes and how it is executed."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    name: str
    stage: Stage
    parent: str
    execution: Execution

    @property
    def inputs(self) -> dict[str, str]:
        """Names by role."""
        return {"parent": self.parent, **self.stage.other_inputs()}


class ParsedRecipe(BaseModel):
    """A recipe with its graph in topological order, and the file it came from."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    recipe: Recipe
    nodes: tuple[Node, ...]
    source: Any  # Located

    def error(self, path: KeyPath, message: str) -> EdgepressError:
        return EdgepressError(f"{self.source.where(path)}: {dotted(path)}: {message}")


def dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))


@lru_cache(maxsize=1)
def _entries() -> TypeAdapter[Any]:
    """One model per kind that joins its parameters with `Execution`, as a union discriminated by `uses`."""
    models = [create_model(f"{kind.__name__}Entry", __base__=(kind, Execution), __doc__=kind.__doc__) for kind in stage_kinds().values()]
    union: Any = reduce(operator.or_, models)
    entry: Any = Annotated[union, Field(discriminator="uses")] if len(models) > 1 else union
    return TypeAdapter(entry)


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors."""
    schema = Recipe.model_json_schema()
    entries = _entries().json_schema(ref_template="#/$defs/{model}")
    schema.setdefault("$defs", {}).update(entries.pop("$defs", {}))
    schema["properties"]["stages"]["additionalProperties"] = entries
    for short in ("model", "data"):
        schema["properties"][short] = {"anyOf": [{"type": "string"}, schema["properties"][short]]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "edgepress recipe"}


def load_recipe(file: Path, overrides: tuple[str, ...] = ()) -> ParsedRecipe:
    """Read and validate a recipe file. `overrides` are `dotted.key=value` settings put over it.

    Raises EdgepressError with file, line and key for the first mistakes (all of one kind at once).
    """
    source = read_yaml(file)
    if not isinstance(source.value, dict):
        raise EdgepressError(f"{file}:1: a recipe is a mapping with the keys model, data and stages")
    for override in overrides:
        _put(source.value, override)
    document = dict(source.value)
    if isinstance(document.get("model"), str):
        document["model"] = _short_model(document["model"])
    document.setdefault("name", file.stem)
    try:
        recipe = Recipe.model_validate(document)
    except ValidationError as error:
        raise EdgepressError(_told(error, source, (), Recipe)) from None
    if not NAME.fullmatch(recipe.name):
        raise EdgepressError(f"{source.where(('name',))}: name: {recipe.name!r} is not a file name in lower case (letters, digits, - _ .)")
    nodes = _in_order([_node(name, entry, previous, source) for name, entry, previous in _with_previous(recipe.stages)], source)
    return ParsedRecipe(recipe=recipe, nodes=tuple(nodes), source=source)


def _short_model(text: str) -> dict[str, str]:
    path, _, revision = text.partition("@")
    return {"path": path, "revision": revision} if revision else {"path": path}


def _put(document: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise EdgepressError(f"--set {override}: write it as key.of.the.recipe=value")
    *folders, last = key.split(".")
    for folder in folders:
        document = document.setdefault(folder, {})
        if not isinstance(document, dict):
            raise EdgepressError(f"--set {override}: {folder} is no mapping in the recipe")
    try:
        document[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise EdgepressError(f"--set {override}: the value is not YAML: {getattr(error, 'problem', error)}") from None


def _with_previous(stages: dict[str, Any]) -> list[tuple[str, Any, str]]:
    names = list(stages)
    return [(name, stages[name], names[i - 1] if i else BASE) for i, name in enumerate(names)]


def _node(name: str, entry: Any, previous: str, source: Located) -> Node:
    where: KeyPath = ("stages", name)
    if not NAME.fullmatch(name) or name == BASE:
        raise EdgepressError(
            f"{source.where(where)}: a stage cannot be called {name!r}: use lower case letters, digits, - _ . (and not {BASE!r})"
        )
    if not isinstance(entry, dict) or "uses" not in entry:
        raise EdgepressError(f"{source.where(where)}: {dotted(where)}: a stage needs `uses`, one of {', '.join(stage_kinds())}")
    kind = stage_kinds().get(str(entry["uses"]))
    if kind is None:
        raise EdgepressError(
            f"{source.where((*where, 'uses'))}: {dotted(where)}.uses: there is no stage kind {entry['uses']!r}"
            f"{_nearest(str(entry['uses']), list(stage_kinds()))}; kinds: {', '.join(stage_kinds())}"
        )
    parameters = {key: value for key, value in entry.items() if key not in Execution.model_fields}
    settings = {key: value for key, value in entry.items() if key in Execution.model_fields}
    try:
        stage, execution = kind.model_validate(parameters), Execution.model_validate(settings)
    except ValidationError as error:
        raise EdgepressError(_told(error, source, where, kind)) from None
    return Node(name=name, stage=stage, parent=execution.needs or previous, execution=execution)


def _in_order(nodes: list[Node], source: Located) -> list[Node]:
    """Topological order, stable in the file's order. Raises for an unknown dependency or a cycle."""
    names = {node.name for node in nodes}
    for node in nodes:
        for role, needed in node.inputs.items():
            if needed not in names | {BASE}:
                key: KeyPath = ("stages", node.name, "needs" if role == "parent" else role)
                raise EdgepressError(
                    f"{source.where(key)}: {dotted(key)}: there is no stage {needed!r}{_nearest(needed, [*names, BASE])}; stages: {', '.join([BASE, *names])}"
                )
    done, order, waiting = {BASE}, [], list(nodes)
    while waiting:
        ready = next((n for n in waiting if done.issuperset(n.inputs.values())), None)
        if ready is None:
            cycle = ", ".join(n.name for n in waiting)
            where: KeyPath = ("stages", waiting[0].name, "needs")
            raise EdgepressError(f"{source.where(where)}: {dotted(where)}: the stages {cycle} wait for each other (a cycle)")
        waiting.remove(ready)
        order.append(ready)
        done.add(ready.name)
    return order


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _told(error: ValidationError, source: Located, prefix: KeyPath, model: type[BaseModel]) -> str:
    """Pydantic's findings as lines of `file:line: key: what is wrong`."""
    lines = []
    for finding in error.errors(include_url=False):
        path: KeyPath = (*prefix, *finding["loc"])
        known = [*model.model_fields, *(Execution.model_fields if issubclass(model, Stage) else ())]
        message = finding["msg"]
        if finding["type"] == "extra_forbidden" and len(finding["loc"]) == 1:
            message = f"there is no such key{_nearest(str(finding['loc'][-1]), known)}; keys: {', '.join(known)}"
        elif finding["type"] == "extra_forbidden":
            message = "there is no such key"
        elif finding["type"] == "missing":
            message = "this key is missing"
        lines.append(f"{source.where(path)}: {dotted(path)}: {message}")
    return "\n".join(lines)
