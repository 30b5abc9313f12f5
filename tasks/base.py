"""The base model: from the package, a directory or the hub, normalised once, and its identity. Imports no torch."""

import json
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from compression.checkpoints.checkpoint import Checkpoint, Limits, model_files, open_checkpoint
from compression.data.hub import hub_failure
from compression.errors import UnusableModel
from compression.files import atomic_directory, digest_file, write_json
from compression.locks import file_lock
from tasks.store.identity import digest, library_versions

EMBEDDED = Path(__file__).resolve().parent.parent / "compression" / "reference" / "model"
_WANTED = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "README.md", "LICENSE*"]
_NORMALIZATION = 1
"""Raise it whenever `compression.checkpoints.normalization` makes other bytes, limits or warnings from the same directory."""


@dataclass(frozen=True)
class Base:
    """A model that stages start from, normalised (`compression.checkpoints.normalization`).

    Attributes:
        checkpoint: The normalised checkpoint.
        identity: Digest of its content, or `hub:id@commit`.
        content: Digest of the bytes that are read.
        source: "embedded", a directory or a hub id, as the recipe names it.
        revision: The commit of a model of the hub.
        license: What the recipe or the model card states, or "unknown".
        origin: The directory that was normalised.
        found: Digest of the bytes that are read of `origin`.
        warnings: Findings of the normalisation that a person must see.
    """

    checkpoint: Checkpoint
    identity: str
    content: str
    source: str
    revision: str | None
    license: str
    origin: Path
    found: str
    warnings: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        return self.checkpoint.path


def open_base(source: str, revision: str | None, license_name: str | None, cache: Path) -> Base:
    """Locate a model, normalise it and open it.

    Args:
        source: "embedded", a directory, or a hub id.
        revision: A revision of a hub id.
        license_name: What the recipe states in place of the model card.
        cache: The root of a store, which keeps digests of unchanged files (`digests/`) and normalised models (`bases/`).

    Raises:
        UnusableModel: It does not exist, cannot be downloaded, or is a model that edgepress does not support.
    """
    origin, commit = _locate(source, revision)
    open_checkpoint(origin)  # refuse early whatever needs no transformers
    found = _content_digest(origin, cache)
    checkpoint, content, warnings = _normalized(origin, found, cache)
    identity = f"hub:{source}@{commit}{'' if content == found else f'+{content[:16]}'}" if commit else content
    return Base(checkpoint, identity, content, source, commit, license_name or _license(origin), origin, found, warnings)


def is_unchanged(base: Base, cache: Path) -> bool:
    """Return whether the directory of a model still holds the bytes that were planned with."""
    return _content_digest(base.origin, cache) == base.found


def _normalized(origin: Path, found: str, cache: Path) -> tuple[Checkpoint, str, tuple[str, ...]]:
    """Return the normalised checkpoint, the digest of its content, and warnings. It is the directory itself where nothing needs to change."""
    if origin == EMBEDDED:  # it is normal (a test proves it), so that the demo need not wait
        return open_checkpoint(origin), found, ()
    versions = library_versions(("transformers", "tokenizers", "torch"))
    home = cache / "bases" / digest({"origin": str(origin), "content": found, "version": _NORMALIZATION, "libraries": versions})[:16]
    (cache / "locks").mkdir(parents=True, exist_ok=True)
    with file_lock(cache / "locks" / f"base-{home.name}.lock"):  # of two plans at once, one normalises
        if (report := _read_cached(home / "report.json")) is None:
            with atomic_directory(home) as partial:
                report = _normalize(origin, partial / origin.name)
                report["content"] = _content_digest(partial / origin.name, cache) if report["changed"] else found
                write_json(partial / "report.json", report)
    checkpoint = open_checkpoint(home / origin.name if report["changed"] else origin)
    return replace(checkpoint, limits=Limits(**report["limits"])), report["content"], tuple(report["warnings"])


def _normalize(origin: Path, out: Path) -> dict[str, Any]:
    """Normalise in a child process, or in this one where transformers is loaded already (a notebook, a test)."""
    if "transformers" in sys.modules:
        from compression.checkpoints.normalization import normalize

        return asdict(normalize(origin, out))
    folder = out.parent / "job"
    job = {"call": "tasks.runners.jobs:normalize_base", "arguments": {"source": str(origin), "out": str(out)}, "threads": 1, "seed": 0}
    write_json(folder / "job.json", job | {"device": "cpu", "visible_devices": [], "directory": str(Path.cwd())})
    # not through an executor, whose jobs wait while anything on the machine is timed: a plan must not wait
    process = subprocess.run(
        [sys.executable, "-P", "-m", "tasks.runners.worker", folder / "job.json"], stdin=subprocess.DEVNULL, check=False
    )
    if (folder / "result.json").exists():
        return json.loads((folder / "result.json").read_text())["details"]
    if not (folder / "error.json").exists():
        raise UnusableModel(f"{origin} could not be opened: its process ended with status {process.returncode}", key="model")
    error = json.loads((folder / "error.json").read_text())
    message = error["message"] if error["kind"] == "user" else f"{origin} could not be opened: {error['type']}: {error['message']}"
    raise UnusableModel(message, key="model")


def _locate(source: str, revision: str | None) -> tuple[Path, str | None]:
    if source == "embedded":
        return EMBEDDED, None
    try:
        local = Path(source).expanduser()
        is_directory = local.is_dir()
    except (OSError, RuntimeError) as error:  # a name that is too long, `~` of an unknown user
        raise UnusableModel(f"there is no model directory {source}: {getattr(error, 'strerror', error)}", key="model") from None
    if is_directory:
        if revision:
            raise UnusableModel(f"{source} is a local directory, which has no revision {revision!r}", key="model")
        return local.resolve(), None
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or local.is_absolute() or source.startswith("."):
        raise UnusableModel(f"there is no model directory {source}", key="model")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=_WANTED))
    except (HTTPError, OSError, HFValidationError) as error:
        raise UnusableModel(f"there is no directory {source}, and {hub_failure(error)}", key="model") from None
    return folder, folder.name  # the name of a snapshot's folder is its commit


def _content_digest(path: Path, cache: Path) -> str:
    """Return the sha256 over the files of a model directory that are read."""
    return digest({file.relative_to(path).as_posix(): _file_digest(file.resolve(), cache) for file in model_files(path)})


def _file_digest(file: Path, cache: Path) -> str:
    """Return the sha256 of a file, from the cache where its size, inode and time of modification are those of an earlier call."""
    status = file.stat()
    stamp = [status.st_size, status.st_mtime_ns, status.st_ino]
    cached_file = cache / "digests" / f"{digest(str(file))}.json"
    if (cached := _read_cached(cached_file)) is not None and cached["stamp"] == stamp:
        return cached["sha256"]
    sha256 = digest_file(file)
    write_json(cached_file, {"path": str(file), "stamp": stamp, "sha256": sha256})
    return sha256


def _read_cached(file: Path) -> dict[str, Any] | None:
    """Return the JSON of a cache's file; None where it is absent or damaged, so that it is written again."""
    try:
        return json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return None


def _license(path: Path) -> str:
    """Return the licence that the model card states, or "unknown"."""
    card = path / "README.md"
    stated = re.search(r"^license:\s*(\S+)", card.read_text(errors="replace"), re.MULTILINE) if card.is_file() else None
    return stated[1] if stated else "unknown"
