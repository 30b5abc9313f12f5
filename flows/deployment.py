"""The entry point that deployments of edgepress 0.1 name; today it is `flows.run.deployment`."""

from flows.run.deployment import run_recipe

__all__ = ["run_recipe"]
