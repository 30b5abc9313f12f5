"""The base model: from the package, a directory or the hub, and its identity. Imports no torch."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from compression.checkpoint import Checkpoint, file_digests, open_checkpoint
from compression.data.hub import why_not_given
from compression.errors import UnusableModel
from tasks.files import write_json
from tasks.identity import digest

EMBEDDED = Path(__file__).resolve().parent.parent / "compression" / "reference" / "model"
_WANTED = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "README.md", "LICENSE*"]


@dataclass(frozen=True)
class Base:
    """The model everything starts from.

    identity  digest of its content, or `hub:id@commit`
    content   digest of its bytes
    """

    checkpoint: Checkpoint
    identity: str
    content: str
    source: str
    revision: str | None
    license: str

    @property
    def path(self) -> Path:
        return self.checkpoint.path


def open_base(source: str, revision: str | None, license_name: str | None, cache: Path) -> Base:
    """Find the model and look at it. Raises UnusableModel. `cache` keeps digests of unchanged directories."""
    path, commit = _locate(source, revision)
    checkpoint = open_checkpoint(path)
    content = _content_digest(path, cache)
    identity = f"hub:{source}@{commit}" if commit else content
    return Base(checkpoint, identity, content, source, commit, license_name or _license(path))


def is_unchanged(base: Base, cache: Path) -> bool:
    """Whether a model's directory holds the bytes that were planned with."""
    return _content_digest(base.path, cache) == base.content


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
    """sha256 over the directory's files, looked up by their sizes and modification times when they were hashed before."""
    stamp = digest(
        {
            str(f.relative_to(path)): [f.stat().st_size, f.stat().st_mtime_ns, f.stat().st_ino]
            for f in sorted(path.rglob("*"))
            if f.is_file()
        }
    )
    known = cache / "digests" / f"{digest(str(path))}.json"
    if known.exists():
        found = json.loads(known.read_text())
        if found["stamp"] == stamp:
            return found["content"]
    content = digest(file_digests(path))
    write_json(known, {"path": str(path), "stamp": stamp, "content": content})
    return content


def _license(path: Path) -> str:
    """The licence its model card states, or "unknown"."""
    card = path / "README.md"
    found = re.search(r"^license:\s*(\S+)", card.read_text(errors="replace"), re.MULTILINE) if card.is_file() else None
    return found.group(1) if found else "unknown"
