"""Where a result comes from and whether its files are still what they were: `edgepress.json` of an artifact, the store's manifest of a
checkpoint. Imports no torch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compression.errors import UnusableModel
from compression.files import digest_file

CARRIED = ("edgepress.json", "README.md")  # what tasks/artifact.py writes: the only files of an artifact without a digest


@dataclass(frozen=True)
class Provenance:
    """base   source, revision, license, content of the model everything started from, where it is told
    steps  {identity, document} of every stage on the way, the last one is this result's
    files  sha256 by relative path
    """

    base: dict[str, Any]
    steps: list[dict[str, Any]]
    files: dict[str, str]


def read_provenance(path: Path) -> Provenance | None:
    """What is known about a directory (or about a file in it), None where edgepress left nothing. Raises UnusableModel for damaged notes."""
    home = path.resolve() if path.is_dir() else path.resolve().parent
    notes = home / "edgepress.json" if (home / "edgepress.json").is_file() else home.parent / "manifest.json"
    if not notes.is_file() or (notes.name == "manifest.json" and home.name != "content"):
        return None
    try:
        known = json.loads(notes.read_text())
        if notes.name == "manifest.json":
            return Provenance({}, _lineage(known["identity"], home.parent), known["files"])
        own = {"identity": known["identity"], "document": known["document"]}
        return Provenance(known["base"], [*known["ancestors"], own], known["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise UnusableModel(f"{notes} is damaged: {error!r}", key="model") from None


def _lineage(document: dict[str, Any], entry: Path) -> list[dict[str, Any]]:
    """The stages from the base to a store entry, as far as the store still has them."""
    lineage = [{"identity": entry.name, "document": document}]
    parent = document.get("inputs", {}).get("parent")
    while parent is not None:
        manifest = entry.parent / parent / "manifest.json"
        document = json.loads(manifest.read_text())["identity"] if manifest.is_file() else {}
        lineage.insert(0, {"identity": parent, "document": document})
        parent = document.get("inputs", {}).get("parent")
    return lineage


def check_files(path: Path, known: dict[str, str]) -> dict[str, str]:
    """Hash a directory's files: "intact", "differs" or "missing" for the known ones, "unknown" for others (the card and edgepress.json aside)."""
    there = {p.relative_to(path).as_posix(): p for p in sorted(path.rglob("*")) if p.is_file()}
    found = {name: _state(there.get(name), digest) for name, digest in known.items()}
    return found | {name: "unknown" for name in there if name not in known and name not in CARRIED}


def _state(file: Path | None, digest: str) -> str:
    if file is None:
        return "missing"
    return "intact" if digest_file(file) == digest else "differs"
