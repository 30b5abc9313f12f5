"""Where a result comes from, and whether its files are still the same: `edgepress.json` of an artifact, the store's manifest of a checkpoint.
Imports no torch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compression.errors import UnusableModel
from compression.files import digest_file
from tasks.ancestry import walk_ancestors

CARRIED = ("edgepress.json", "README.md")  # what tasks/artifact.py writes: the only files of an artifact without a digest


@dataclass(frozen=True)
class Provenance:
    """The origin of a result.

    Attributes:
        base: source, revision, license and content of the base model, as far as they are recorded.
        steps: {identity, document} of every stage from the base to this result, in order.
        files: sha256 by relative path.
    """

    base: dict[str, Any]
    steps: list[dict[str, Any]]
    files: dict[str, str]


def read_provenance(path: Path) -> Provenance | None:
    """Return what is recorded about a directory, or about the directory of a file; None where edgepress recorded nothing.

    Raises:
        UnusableModel: The record is damaged.
    """
    home = path.resolve() if path.is_dir() else path.resolve().parent
    file = home / "edgepress.json" if (home / "edgepress.json").is_file() else home.parent / "manifest.json"
    if not file.is_file() or (file.name == "manifest.json" and home.name != "content"):
        return None
    try:
        known = json.loads(file.read_text())
        if file.name == "manifest.json":
            return Provenance({}, _steps_to(known["identity"], home.parent), known["files"])
        own = {"identity": known["identity"], "document": known["document"]}
        return Provenance(known["base"], [*known["ancestors"], own], known["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise UnusableModel(f"{file} is damaged: {error!r}", key="model") from None


def _steps_to(document: dict[str, Any], entry: Path) -> list[dict[str, Any]]:
    """Return the stages from the base to a store entry, as far as the store still has them."""
    documents = {entry.name: document}

    def parent(identity: str) -> list[str]:
        manifest = entry.parent / identity / "manifest.json"
        if identity not in documents:
            documents[identity] = json.loads(manifest.read_text())["identity"] if manifest.is_file() else {}
        inputs = documents[identity].get("inputs", {})
        return [inputs["parent"]] if inputs.get("parent") is not None else []

    return [{"identity": identity, "document": documents[identity]} for identity in walk_ancestors([entry.name], parent)]


def check_files(path: Path, known: dict[str, str]) -> dict[str, str]:
    """Hash the files of a directory and compare them with the known sha256 digests.

    Args:
        path: The directory.
        known: sha256 by relative path.

    Returns:
        "intact", "differs" or "missing" for each known file, "unknown" for every other one but the card and `edgepress.json`.
    """
    files = {file.relative_to(path).as_posix(): file for file in sorted(path.rglob("*")) if file.is_file()}
    states = {name: _state(files.get(name), digest) for name, digest in known.items()}
    return states | {name: "unknown" for name in files if name not in known and name not in CARRIED}


def _state(file: Path | None, digest: str) -> str:
    if file is None:
        return "missing"
    return "intact" if digest_file(file) == digest else "differs"
