"""The base model: from the package, a directory or the hub, normalised once, and its identity. Imports no torch."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from compression.checkpoints.checkpoint import Checkpoint, Limits, model_files, open_checkpoint
from compression.data.hub import why_not_given
from compression.errors import UnusableModel
from compression.files import digest_file
from compression.locks import file_lock
from tasks.store.files import write_json
from tasks.store.identity import digest, library_versions

EMBEDDED = Path(__file__).resolve().parent.parent / "compression" / "reference" / "model"
_WANTED = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "README.md", "LICENSE*"]
_NORMALIZATION = 1
"""Raise it whenever `compression.checkpoints.normalization` makes other bytes, limits or warnings of the same directory."""


@dataclass(frozen=True)
class Base:
    """The model everything starts from, normalised (`compression.checkpoints.normalization`).

    identity  digest of its content, or `hub:id@commit`
    content   digest of the bytes that are read
    origin    the directory it was found in, and
    found     the digest of what is read of that
    warnings  what was found on the way that a person must see
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
    """Find the model, normalise it and look at it. Raises UnusableModel.

    cache  a store: it keeps digests of unchanged directories, and what they were normalised to (`bases/`)
    """
    origin, commit = _locate(source, revision)
    open_checkpoint(origin)  # what can be refused without transformers is refused at once
    found = _content_digest(origin, cache)
    checkpoint, content, warnings = _normalized(origin, found, cache)
    identity = f"hub:{source}@{commit}{'' if content == found else f'+{content[:16]}'}" if commit else content
    return Base(checkpoint, identity, content, source, commit, license_name or _license(origin), origin, found, warnings)


def is_unchanged(base: Base, cache: Path) -> bool:
    """Whether a model's directory holds the bytes that were planned with."""
    return _content_digest(base.origin, cache) == base.found


def _normalized(origin: Path, found: str, cache: Path) -> tuple[Checkpoint, str, tuple[str, ...]]:
    """The normalised checkpoint, the digest of its content, and warnings. It is the directory itself where nothing is to change."""
    if origin == EMBEDDED:  # it is kept as it has to be (a test sees to it), so that the demo need not wait
        return open_checkpoint(origin), found, ()
    versions = library_versions(("transformers", "tokenizers", "torch"))
    home = cache / "bases" / digest({"origin": str(origin), "content": found, "version": _NORMALIZATION, "libraries": versions})[:16]
    (cache / "locks").mkdir(parents=True, exist_ok=True)
    with file_lock(cache / "locks" / f"base-{home.name}.lock"):  # of two that plan at once, one works
        if (report := _kept(home / "report.json")) is None:
            shutil.rmtree(home, ignore_errors=True)
            beside = home.with_name(f".{home.name}")
            shutil.rmtree(beside, ignore_errors=True)
            try:
                found_out = _normalize(origin, beside / origin.name)
                report = found_out | {"content": _content_digest(beside / origin.name, cache) if found_out["changed"] else found}
                write_json(beside / "report.json", report)
                beside.rename(home)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
    checkpoint = open_checkpoint(home / origin.name if report["changed"] else origin)
    return replace(checkpoint, limits=Limits(**report["limits"])), report["content"], tuple(report["warnings"])


def _normalize(origin: Path, out: Path) -> dict[str, Any]:
    """Normalise in a child, or here where transformers is loaded already (a notebook, a test)."""
    if "transformers" in sys.modules:
        from compression.checkpoints.normalization import normalize

        return asdict(normalize(origin, out))
    folder = out.parent / "job"
    job = {"call": "tasks.runners.jobs:normalize_base", "arguments": {"source": str(origin), "out": str(out)}, "threads": 1, "seed": 0}
    write_json(folder / "job.json", job | {"device": "cpu", "visible_devices": [], "directory": str(Path.cwd())})
    # not one of a flow's children: those wait while anything on the machine is timed, and a plan is wanted now
    done = subprocess.run([sys.executable, "-P", "-m", "tasks.runners.worker", folder / "job.json"], stdin=subprocess.DEVNULL, check=False)
    if (folder / "result.json").exists():
        return json.loads((folder / "result.json").read_text())["details"]
    if not (folder / "error.json").exists():
        raise UnusableModel(f"{origin} could not be opened: the process that looked at it ended with status {done.returncode}", key="model")
    error = json.loads((folder / "error.json").read_text())
    what = error["message"] if error["kind"] == "user" else f"{origin} could not be opened: {error['type']}: {error['message']}"
    raise UnusableModel(what, key="model")


def _locate(source: str, revision: str | None) -> tuple[Path, str | None]:
    if source == "embedded":
        return EMBEDDED, None
    try:
        local = Path(source).expanduser()
        found = local.is_dir()
    except (OSError, RuntimeError) as error:  # a name that is too long, `~` of a user that is not there
        raise UnusableModel(f"there is no model directory {source}: {getattr(error, 'strerror', error)}", key="model") from None
    if found:
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
        raise UnusableModel(f"there is no directory {source}, and {why_not_given(error)}", key="model") from None
    return folder, folder.name  # a snapshot's folder is named by its commit


def _content_digest(path: Path, cache: Path) -> str:
    """sha256 over the files of a model directory that are read."""
    return digest({file.relative_to(path).as_posix(): _file_digest(file.resolve(), cache) for file in model_files(path)})


def _file_digest(file: Path, cache: Path) -> str:
    """sha256 of a file, looked up by its size, inode and time of modification where it was hashed before."""
    status = file.stat()
    stamp = [status.st_size, status.st_mtime_ns, status.st_ino]
    known = cache / "digests" / f"{digest(str(file))}.json"
    if (kept := _kept(known)) is not None and kept["stamp"] == stamp:
        return kept["sha256"]
    sha256 = digest_file(file)
    write_json(known, {"path": str(file), "stamp": stamp, "sha256": sha256})
    return sha256


def _kept(file: Path) -> dict[str, Any] | None:
    """What a file of a cache holds; None where it is not there, or damaged: it is made again."""
    try:
        return json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return None


def _license(path: Path) -> str:
    """The licence its model card states, or "unknown"."""
    card = path / "README.md"
    found = re.search(r"^license:\s*(\S+)", card.read_text(errors="replace"), re.MULTILINE) if card.is_file() else None
    return found.group(1) if found else "unknown"
