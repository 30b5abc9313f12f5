"""A Hugging Face tokenizer as GGUF's vocabulary: tokens, their types, merges or scores, special tokens."""

import json
import re
from dataclasses import dataclass
from typing import Any, Protocol

from gguf import TokenType

from compression.errors import Incompatible
from export.gguf.pretokenizer import Definition, recognize


class FastTokenizer(Protocol):
    """What is used of transformers' fast tokenizers."""

    bos_token_id: int | None
    eos_token_id: int | None
    unk_token_id: int | None
    pad_token_id: int | None
    chat_template: str | None

    @property
    def backend_tokenizer(self) -> Any: ...


@dataclass(frozen=True)
class Vocabulary:
    """Everything under tokenizer.ggml.*; `merges` for gpt2, `scores` for llama."""

    definition: Definition
    tokens: list[str]
    types: list[TokenType]
    merges: list[str] | None
    scores: list[float] | None
    special: dict[str, int]  # bos, eos, unk, pad -> token id
    add_bos: bool
    add_eos: bool
    chat_template: str | None


def read_vocabulary(tokenizer: FastTokenizer, vocab_size: int, config: dict[str, Any]) -> Vocabulary:
    """Describe a loaded tokenizer in GGUF's terms. It is asked as loaded, because transformers rebuilds some from its own classes.

    vocab_size  rows of the embedding; ids that no token has are filled with unused ones
    config      config.json, which names begin and end of text where the tokenizer does not
    Raises Incompatible: an unknown kind (`recognize`), more tokens than rows, no end of text, other special tokens added than these two.
    """
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    definition, model = recognize(description), description["model"]
    added = {token["id"]: token for token in description["added_tokens"]}
    ids = {id: token for token, id in model["vocab"].items()} | {id: token["content"] for id, token in added.items()}
    if max(ids) >= vocab_size:
        raise Incompatible(f"token {ids[max(ids)]!r} has the id {max(ids)}, but the embedding has only {vocab_size} rows", key="model")
    special = _special_tokens(tokenizer, config)
    add_bos, add_eos = _adds(tokenizer, special)
    types = [_type(ids.get(i), added.get(i), i == special.get("unk"), definition.model) for i in range(vocab_size)]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    tokens = [ids.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    return Vocabulary(
        definition, tokens, types,
        merges=[" ".join(m) for m in merges] if definition.model == "gpt2" else None,
        scores=merge_scores(tokens, merges) if definition.model == "llama" else None,
        special=special, add_bos=add_bos, add_eos=add_eos, chat_template=tokenizer.chat_template,
    )  # fmt: skip


def merge_scores(tokens: list[str], merges: list[tuple[str, ...]]) -> list[float]:
    """Scores under which merging the best-scored neighbours first repeats BPE by merge rank: minus the first rank that yields the token.

    Tokens that no merge yields (single characters, bytes, special tokens) come last.
    """
    rank: dict[str, int] = {}
    for i, pair in enumerate(merges):
        rank.setdefault("".join(pair), i)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _special_tokens(tokenizer: FastTokenizer, config: dict[str, Any]) -> dict[str, int]:
    def first(value: int | list[int] | None) -> int | None:
        return value[0] if isinstance(value, list) else value

    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else first(config.get("eos_token_id"))
    if eos is None:  # llama.cpp would take token 11 for it
        raise Incompatible("neither the tokenizer nor config.json names an end-of-text token (eos_token); llama.cpp needs one", key="model")
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else first(config.get("bos_token_id"))
    named = {"bos": eos if bos is None else bos, "eos": eos, "unk": tokenizer.unk_token_id, "pad": tokenizer.pad_token_id}
    return {name: id for name, id in named.items() if id is not None}


def _adds(tokenizer: FastTokenizer, special: dict[str, int]) -> tuple[bool, bool]:
    """Whether the post-processor puts begin and end of text around a text, seen by letting it."""
    bare = tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).ids
    full = tokenizer.backend_tokenizer.encode("a", add_special_tokens=True).ids
    for add_bos in (False, True):
        for add_eos in (False, True):
            if full == [special["bos"]] * add_bos + bare + [special["eos"]] * add_eos:
                return add_bos, add_eos
    raise Incompatible(
        f"the tokenizer puts {full} around {bare}; llama.cpp adds begin and end of text ({special}) and nothing else", key="model"
    )


def _type(token: str | None, added: dict[str, Any] | None, unknown: bool, model: str) -> TokenType:
    if token is None:
        return TokenType.UNUSED
    if model == "llama" and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return TokenType.BYTE
    if unknown and model == "llama":
        return TokenType.UNKNOWN
    if added is not None:
        return TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    return TokenType.NORMAL
