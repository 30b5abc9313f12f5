"""The recipes that come with edgepress plan as they stand."""

from pathlib import Path

import pytest

from flows.planning import load_recipe, make_plan
from tasks.stage import Artifact
from tasks.store.store import Store

RECIPES = Path(__file__).parents[2] / "flows" / "recipes"


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_it_plans(file: Path, tmp_path: Path) -> None:
    plan = make_plan(load_recipe(file), Store(tmp_path))
    assert plan.parsed.recipe.name == file.stem


def test_exports_shows_every_way_out(tmp_path: Path) -> None:
    """But ExecuTorch, whose package is not among the extra `export`."""
    plan = make_plan(load_recipe(RECIPES / "exports.yaml"), Store(tmp_path))
    found = {task.definition.uses for task in plan.stages if task.definition and isinstance(task.product, Artifact)}
    assert found == {"export.onnx", "export.openvino", "export.gguf", "export.genai"}
    assert len(plan.stages) == 13, "the base and twelve stages"
