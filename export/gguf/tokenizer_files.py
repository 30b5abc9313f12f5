"""What a checkpoint's files say of its tokenizer. tokenizer.json is the truth: no class of transformers rebuilds it. Imports no torch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from compression.checkpoints.checkpoint import tokenizer_files
from compression.data.templates import chat_templates

NAMES = ("bos", "eos", "unk", "pad")


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer of a model directory.

    definition  the content of tokenizer.json
    backend     the tokenizer itself, which neither pads nor cuts
    named       the ids of bos, eos, unk and pad, of those that a file names
    templates   chat templates by name; the only one is called "default"
    ends        ids that end a text when generating, in the order of generation_config.json, then of config.json
    """

    definition: dict[str, Any]
    backend: Tokenizer
    named: dict[str, int]
    templates: dict[str, str]
    ends: tuple[int, ...]


def stamp_of(path: Path) -> tuple[tuple[str, int, int], ...]:
    """What changes when a file of the tokenizer does: names, times of modification, sizes."""
    files = [path / name for name in ("config.json", *tokenizer_files(path))]
    return tuple((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files if file.is_file())


def read_tokenizer_files(path: Path) -> TokenizerFiles:
    """Read a model directory."""
    definition = _json(path / "tokenizer.json")
    backend = Tokenizer.from_file(str(path / "tokenizer.json"))
    backend.no_padding()
    backend.no_truncation()
    settings = _json(path / "special_tokens_map.json") | _json(path / "tokenizer_config.json")
    named: dict[str, int] = {}
    for name in NAMES:
        token = settings.get(f"{name}_token")
        text = token["content"] if isinstance(token, dict) else token
        if text is None and name == "unk":
            text = definition["model"].get("unk_token")
        if text is not None and (id := backend.token_to_id(text)) is not None:
            named[name] = id
    config = _json(path / "config.json")
    for name in ("bos", "eos"):  # of a tokenizer that names none, those of the model
        if name not in named and (ids := _ids(config, f"{name}_token_id")):
            named[name] = ids[0]
    ends = dict.fromkeys(_ids(_json(path / "generation_config.json"), "eos_token_id") + _ids(config, "eos_token_id"))
    return TokenizerFiles(definition, backend, named, chat_templates(path), tuple(ends))


def _ids(settings: dict[str, Any], key: str) -> list[int]:
    value = settings.get(key)
    return value if isinstance(value, list) else [] if value is None else [value]


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
