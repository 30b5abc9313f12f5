"""`edgepress inspect`: what a checkpoint or artifact is, where it comes from, and whether its files are still what they were."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from compression.checkpoints.checkpoint import open_checkpoint
from compression.files import size_of
from export.contents import read_contents
from tasks.artifact import chosen_parameters
from tasks.store.provenance import check_files, read_provenance


def inspect_model(path: Path, *, verify: bool) -> dict[str, Any]:
    """Everything that is known about `path`, as JSON would hold it. Raises UnusableModel, MissingExtra.

    verify  hash the files whose sha256 is known; `files` tells "intact", "differs", "missing" or "unknown" of each, else nothing
    """
    contents = read_contents(path)
    provenance = read_provenance(path)
    home = path.resolve() if path.is_dir() else path.resolve().parent
    return {
        "path": str(path),
        "kind": "checkpoint" if contents.runtime == "transformers" else "artifact",
        "runtime": contents.runtime,
        "bytes": size_of(home) if path.is_dir() else path.stat().st_size,
        "architecture": contents.architecture,
        "parameters": contents.parameters or None,
        "tensors": [{"type": t.type, "count": t.count, "bytes": t.bytes} for t in contents.tensors],
        "bits_per_weight": contents.bits_per_weight,
        "settings": contents.settings,
        "sparsity": _sparsity(path) if contents.runtime == "transformers" else None,
        "base": provenance.base if provenance else {},
        "steps": provenance.steps if provenance else [],
        "files": check_files(home, provenance.files) if provenance and verify else {},
        "provenance": provenance is not None,
    }


def _sparsity(path: Path) -> float | None:
    """Share of zeros in a checkpoint with masks; torch is imported for these only."""
    if not open_checkpoint(path).sparse:
        return None
    from compression.evaluation.sparsity import sparsity

    return sparsity(path)


def altered(found: dict[str, Any]) -> list[str]:
    """Files that are not what they were."""
    return [f"{name} {state}" for name, state in found["files"].items() if state in ("differs", "missing")]


def print_inspection(found: dict[str, Any], console: Console) -> None:
    """The same for people."""
    table = Table(title=escape(found["path"]), show_header=False)
    table.add_row(found["kind"], f"opens in {found['runtime']}, {found['bytes'] / 1e6:.2f} MB")
    table.add_row("architecture", escape(", ".join(_said(key, value) for key, value in found["architecture"].items())))
    if found["parameters"]:
        table.add_row("parameters", f"{found['parameters'] / 1e6:.2f} M")
    if found["bits_per_weight"]:
        table.add_row("bits per weight", f"{found['bits_per_weight']:.2f}")
    types = [f"{t['type']}: {t['count']} tensors, {t['bytes'] / 1e6:.2f} MB" for t in found["tensors"]]
    table.add_row("tensors", "\n".join(types) or f"listed by {found['runtime']} only")
    table.add_row("settings", escape("\n".join(_said(key, value) for key, value in found["settings"].items())))
    if found["sparsity"] is not None:
        table.add_row("sparsity", f"{found['sparsity']:.3f}, kept by masks")
    table.add_row("base", escape(", ".join(_said(key, value) for key, value in found["base"].items() if value)) or "not told")
    table.add_row("made by", escape("\n".join(_step(step) for step in found["steps"])) or "not by edgepress, or not told")
    table.add_row("files", escape(_files(found)))
    console.print(table)


def _said(key: str, value: Any) -> str:
    return f"{key} {json.dumps(value) if isinstance(value, list | dict | bool) else value}"


def _step(step: dict[str, Any]) -> str:
    """A stage with its parameters, as the recipe might say it."""
    document = step["document"]
    if "uses" not in document:
        return f"base model, or a stage that the store no longer has: {step['identity'][:12]}"
    libraries = ", ".join(f"{name} {version}" for name, version in document["libraries"].items())
    return f"{document['uses']} {json.dumps(chosen_parameters(document))} [{libraries}] {step['identity'][:12]}"


def _files(found: dict[str, Any]) -> str:
    if not found["provenance"]:
        return "no digests known"
    if not found["files"]:
        return "not verified"
    counts = ", ".join(f"{count} {state}" for state, count in sorted(Counter(found["files"].values()).items()))
    return "\n".join([counts, *altered(found), *(f"{name} unknown" for name, state in found["files"].items() if state == "unknown")])
