"""Read a recipe from YAML and validate all of it. Every error names file, line, key and remedy.

flows/planning/graph.py builds the graph of its stages, flows/planning/matrix.py expands its matrix.
"""

import operator
import re
from collections.abc import Sequence
from functools import lru_cache, reduce
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model

from compression.data import DataSpec
from compression.errors import EdgepressError
from compression.evaluation.spec import EvaluationSpec
from compression.settings import Settings
from flows.planning.graph import build_graph, invalid_name_reason
from flows.planning.matrix import Matrix, expand_matrix
from flows.planning.nodes import Branch, Node, StageExecution
from flows.planning.recipe_errors import recipe_error
from flows.planning.source_map import KeyPath, SourceMap, read_value, read_yaml, shortened
from flows.planning.study import Study, StudyError, check_study
from tasks.measurement.gate_presets import Gates
from tasks.runners.settings import ExecutionSettings
from tasks.stage import stage_kinds
from tasks.tracking import Registry

RECIPES = Path(__file__).parents[1] / "recipes"

_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


class ModelSource(Settings):
    """Where the base model comes from."""

    path: str = Field(description="`embedded`, a local directory, or a hub id (organisation/name).")
    revision: str | None = Field(default=None, description="Commit, tag or branch of a hub model; pinned to the commit in the identity.")
    license: str | None = Field(default=None, description="Licence of the model, where its model card does not say it.")


class Recipe(Settings):
    """A recipe: the model, the data, the stages and how they are judged and run."""

    name: str = Field(default="", description="Name of the pipeline; default: the file's name.")
    model: ModelSource = Field(description="The base model: `embedded`, a directory, a hub id, or {path:, revision:}.")
    data: DataSpec = Field(description="Text and questions to calibrate, train and measure with: `embedded` or a mapping.")
    seed: int = Field(default=0, ge=0, description="Every random draw derives from it.")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        default="auto",
        description="Where stages run; its type belongs to the identity. `auto`: cuda where torch can use a GPU of NVIDIA's, else cpu.",
    )
    threads: int = Field(
        default=2, ge=1, le=256, description="Threads of each stage: fixed, because sums differ in bytes with their number."
    )
    stages: dict[str, Any] = Field(min_length=1, description="The graph: name -> {uses: kind, ...}.")
    matrix: Matrix | None = Field(default=None, description="A sweep: values of parameters to try, each combination a branch of the graph.")
    study: Study | None = Field(default=None, description="The question of the sweep: `edgepress study` judges its claims.")
    gates: Gates = Field(
        default_factory=dict,
        description="Bounds by stage and metric, or a preset by stage; a broken one stops the stages that follow. Besides names, keys are `leaf` (every "
        "stage that nothing follows), patterns of kinds (`prune.*`), and `preset: default`.",
    )
    evaluation: EvaluationSpec = Field(
        default_factory=EvaluationSpec, description="What is measured of the base and of every stage beyond quality, speed and memory."
    )
    registry: Registry | None = Field(default=None, description="Results that become versions of a model in MLflow's registry.")
    execution: ExecutionSettings = Field(default_factory=ExecutionSettings, description="How and where the stages run.")


class ParsedRecipe(BaseModel):
    """A recipe with its graph in topological order, the branches of its matrix (none without one), its file and its overrides."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    recipe: Recipe
    nodes: tuple[Node, ...]
    branches: tuple[Branch, ...]
    source: SourceMap
    overrides: tuple[str, ...] = ()

    def error(self, path: KeyPath, message: str) -> EdgepressError:
        return self.source.error(path, message)

    def stage_error(self, node: Node, key: KeyPath, message: str) -> EdgepressError:
        """Return an error in a stage's entry, at the place that gives the value: for a copy this may be in the matrix."""
        copy = f" (stage {node.name})" if node.name != node.origin else ""
        return self.source.remap(node.redirects).error(("stages", node.origin, *key), message + copy)


@lru_cache(maxsize=1)
def _entries() -> TypeAdapter[Any]:
    """Join each kind's parameters with `StageExecution`: one model a kind, as a union discriminated by `uses`."""
    models = [
        create_model(f"{kind.__name__}Entry", __base__=(kind, StageExecution), __doc__=kind.__doc__) for kind in stage_kinds().values()
    ]
    union: Any = reduce(operator.or_, models)
    entry: Any = Annotated[union, Field(discriminator="uses")] if len(models) > 1 else union
    return TypeAdapter(entry)


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of recipes, for editors."""
    schema = Recipe.model_json_schema()
    entries = _entries().json_schema(ref_template="#/$defs/{model}")
    schema.setdefault("$defs", {}).update(entries.pop("$defs", {}))
    schema["properties"]["stages"]["additionalProperties"] = entries
    for short in ("model", "data"):
        schema["properties"][short] = {"anyOf": [{"type": "string"}, schema["properties"][short]]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "edgepress recipe"}


def load_recipe(file: Path, overrides: tuple[str, ...] = (), text: str | None = None) -> ParsedRecipe:
    """Read and validate a recipe.

    Args:
        file: The recipe file.
        overrides: Settings `dotted.key=value` that replace its values.
        text: The file's former content, in place of what it holds now.

    Raises:
        EdgepressError: With file, line and key of the first mistakes (all of one kind at once).
    """
    source = read_yaml(file, text)
    if not isinstance(source.value, dict):
        raise EdgepressError(f"{file}:1: a recipe is a mapping with the keys model, data and stages")
    for override in overrides:
        _override(source.value, override)
    document = dict(source.value)
    if isinstance(document.get("model"), str):
        document["model"] = _short_model(document["model"])
    document.setdefault("name", file.stem)
    try:
        recipe = Recipe.model_validate(document)
    except ValidationError as error:
        raise recipe_error(error, source, (), Recipe) from None
    if reason := invalid_name_reason(recipe.name):
        raise source.error(("name",), f"{shortened(recipe.name)!r} {reason}")
    cells = expand_matrix(recipe.matrix, recipe.stages, source)
    nodes, branches = build_graph(recipe.stages, recipe.gates, recipe.seed, cells, source)
    _check_study(recipe, branches, source)
    return ParsedRecipe(
        recipe=recipe, nodes=tuple(nodes), branches=tuple(branches) if recipe.matrix else (), source=source, overrides=overrides
    )


def _check_study(recipe: Recipe, branches: Sequence[Branch], source: SourceMap) -> None:
    if recipe.study is not None:
        results = [(branch.values, leaf) for branch in branches if branch.values for leaf in branch.leaves]
        try:
            check_study(recipe.study, results, list(recipe.stages), recipe.seed)
        except StudyError as error:
            raise source.error(error.path, str(error)) from None


def _short_model(text: str) -> dict[str, str]:
    path, revision = split_revision(text)
    return {"path": path, "revision": revision} if revision else {"path": path}


def split_revision(text: str) -> tuple[str, str | None]:
    """Split `organisation/name@revision` in two. Do not split a path that exists as spelled, nor one of which no part exists."""
    path, _, revision = text.partition("@")
    has_revision = revision and not _is_directory(text) and (_HUB_ID.fullmatch(path) or _is_directory(path))
    return (path, revision) if has_revision else (text, None)


def _is_directory(text: str) -> bool:
    try:
        return Path(text).expanduser().is_dir()
    except (OSError, RuntimeError):  # a name that is too long, `~` of an unknown user: the model's own check refuses these
        return False


def _override(document: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise EdgepressError(f"--set {shortened(override)}: write it as key.of.the.recipe=value")
    # a key of the matrix has dots of its own
    *folders, last = ["matrix", key.removeprefix("matrix.")] if key.startswith("matrix.") else key.split(".")
    for folder in folders:
        inner = document.setdefault(folder, {})
        if not isinstance(inner, dict):
            raise EdgepressError(f"--set {override}: {folder} is not a mapping in the recipe")
        document[folder] = document = dict(inner)  # a copy: a YAML alias may share it with other places
    try:
        document[last] = read_value(value)
    except ValueError as error:
        raise EdgepressError(f"--set {shortened(override)}: {error}") from None


def find_recipe(recipe: Path) -> Path:
    """Return the file as given, or the shipped recipe of that name."""
    shipped = RECIPES / f"{recipe}.yaml"
    try:
        return shipped if not recipe.exists() and shipped.is_file() else recipe
    except OSError:  # a name that is too long: reading it fails with the reason
        return recipe
