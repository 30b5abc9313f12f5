"""`edgepress inspect`: what a checkpoint or artifact is, where it comes from, and whether its files are intact."""

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
    """Collect everything that is known about a checkpoint or an artifact, as JSON would hold it.

    Args:
        path: Its directory, or a GGUF file.
        verify: Hash the files whose sha256 is known: `files` then maps each to "intact", "differs", "missing" or "unknown".

    Raises:
        UnusableModel: It is neither.
        MissingExtra: Its runtime is not installed.
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
    """Share of zeros in a checkpoint with masks; only these need torch."""
    if not open_checkpoint(path).sparse:
        return None
    from compression.evaluation.sparsity import sparsity

    return sparsity(path)


def altered_files(inspection: dict[str, Any]) -> list[str]:
    """List the files that differ or are missing."""
    return [f"{name} {state}" for name, state in inspection["files"].items() if state in ("differs", "missing")]


def print_inspection(inspection: dict[str, Any], console: Console) -> None:
    """Print an inspection as a table."""
    table = Table(title=escape(inspection["path"]), show_header=False)
    table.add_row(inspection["kind"], f"opens in {inspection['runtime']}, {inspection['bytes'] / 1e6:.2f} MB")
    table.add_row("architecture", escape(", ".join(_entry(key, value) for key, value in inspection["architecture"].items())))
    if inspection["parameters"]:
        table.add_row("parameters", f"{inspection['parameters'] / 1e6:.2f} M")
    if inspection["bits_per_weight"]:
        table.add_row("bits per weight", f"{inspection['bits_per_weight']:.2f}")
    types = [f"{t['type']}: {t['count']} tensors, {t['bytes'] / 1e6:.2f} MB" for t in inspection["tensors"]]
    table.add_row("tensors", "\n".join(types) or f"listed by {inspection['runtime']} only")
    table.add_row("settings", escape("\n".join(_entry(key, value) for key, value in inspection["settings"].items())))
    if inspection["sparsity"] is not None:
        table.add_row("sparsity", f"{inspection['sparsity']:.3f}, kept by masks")
    table.add_row("base", escape(", ".join(_entry(key, value) for key, value in inspection["base"].items() if value)) or "unknown")
    table.add_row("made by", escape("\n".join(_step(step) for step in inspection["steps"])) or "not by edgepress, or unknown")
    table.add_row("files", escape(_files(inspection)))
    console.print(table)


def _entry(key: str, value: Any) -> str:
    return f"{key} {json.dumps(value) if isinstance(value, list | dict | bool) else value}"


def _step(step: dict[str, Any]) -> str:
    """A stage with its parameters, as a recipe might write it."""
    document = step["document"]
    if "uses" not in document:
        return f"base model, or a stage that the store no longer has: {step['identity'][:12]}"
    libraries = ", ".join(f"{name} {version}" for name, version in document["libraries"].items())
    return f"{document['uses']} {json.dumps(chosen_parameters(document))} [{libraries}] {step['identity'][:12]}"


def _files(inspection: dict[str, Any]) -> str:
    if not inspection["provenance"]:
        return "no digests known"
    if not inspection["files"]:
        return "not verified"
    counts = ", ".join(f"{count} {state}" for state, count in sorted(Counter(inspection["files"].values()).items()))
    return "\n".join(
        [counts, *altered_files(inspection), *(f"{name} unknown" for name, state in inspection["files"].items() if state == "unknown")]
    )
