"""Summaries of runs as flows/run/summary.py makes them."""

from collections.abc import Callable
from typing import Any

Summary = dict[str, Any]


def row(stage: str, needs: list[str], state: str = "Completed", metrics: dict[str, float] | None = None, **more: object) -> Summary:
    return {
        "stage": stage, "uses": "kind", "needs": needs, "state": state, "seconds": 1.5, "runtime": "transformers",
        "metrics": metrics or {}, "warnings": [], "verdicts": [], "curves": [], "details": {}, "layers": {}, "reason": "", **more,
    }  # fmt: skip


def summary(rows: list[Summary], **more: object) -> Summary:
    return {
        "recipe": {}, "name": "demo", "journal": "demo-1", "started": 0.0, "seconds": 61.0, "rows": rows, "sweep": None, "run": "f00",
        "gates": [{"stage": one["stage"], **verdict} for one in rows for verdict in one["verdicts"]],
        "environment": {
            "edgepress": "0.1", "machine": {"host": "h", "cores": 2}, "device": "cpu", "threads": 2,
            "base": {"source": "models/x", "revision": None, "license": "mit", "content": "c0"},
        }, **more,
    }  # fmt: skip


def sweep(cells: list[dict[str, Any]], metrics: Callable[[dict[str, Any]], dict[str, float]], leaves: tuple[str, ...] = ("q",)) -> Summary:
    """The summary of a sweep whose every cell has these leaves, right after the base."""
    keys = list(dict.fromkeys(key for cell in cells for key in cell))
    found = [
        {"name": str(n), "values": cell, "run": "", "leaves": {leaf: f"{leaf}@{n}" for leaf in leaves}} for n, cell in enumerate(cells)
    ]
    rows = [row("base", [], metrics={"accuracy": 0.9, "perplexity": 4.0})]
    rows += [row(name, ["base"], metrics=metrics(cell["values"])) for cell in found for name in cell["leaves"].values()]
    return summary(rows, sweep={"keys": keys, "cells": found})
