"""From YAML to a checked plan; nothing here runs anything. Imports no torch."""

from flows.planning.nodes import BASE
from flows.planning.plan import Plan, check_disk, estimate, make_plan
from flows.planning.recipe import ParsedRecipe, Recipe, find_recipe, json_schema, load_recipe
from flows.planning.selection import select

__all__ = [
    "BASE", "ParsedRecipe", "Plan", "Recipe", "check_disk", "estimate", "find_recipe", "json_schema", "load_recipe", "make_plan", "select",
]  # fmt: skip
