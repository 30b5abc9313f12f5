"""A checkpoint's tokenizer as GGUF's vocabulary: tokens, their types, merges or scores, special tokens. Imports no torch and no gguf: used
while planning."""

import re
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from compression.errors import Incompatible
from export.gguf.pretokenizer import Definition, recognize
from export.gguf.special import blank_rule, check_found_anywhere, end_tokens
from export.gguf.tokenizer_files import TokenizerFiles, read_tokenizer_files


class TokenType(IntEnum):
    """GGUF's tokenizer.ggml.token_type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """Everything under tokenizer.*.

    merges, scores  for gpt2 and for llama
    special         ids of bos, eos, eot, eom, unk, pad, of those that are written
    templates       chat templates by name, the one for plain conversations is "default"
    strips          special tokens swallow the blanks behind them, in llama.cpp's way for Phi-3
    keeps_blanks    tokens that swallow the blanks behind them here and not in llama.cpp
    losses          what the file cannot say, in words
    backend         the tokenizer that llama.cpp's must equal
    """

    definition: Definition
    tokens: list[str]
    types: list[TokenType]
    merges: list[str] | None
    scores: list[float] | None
    special: dict[str, int]
    add_bos: bool
    add_eos: bool
    templates: dict[str, str]
    strips: bool
    keeps_blanks: frozenset[str]
    losses: tuple[str, ...]
    backend: Tokenizer


def read_vocabulary(path: Path, vocab_size: int) -> Vocabulary:
    """Describe the tokenizer of a model directory in GGUF's terms.

    vocab_size  rows of the embedding; ids that no token has are filled with unused ones

    Raises Incompatible: an unknown kind (`recognize`), tokens without a row, tokens that llama.cpp finds or strips otherwise (`special`), no
    end of text, other special tokens put around a text than begin and end.
    """
    files = read_tokenizer_files(path)
    definition, model = recognize(files.definition), files.definition["model"]
    added = {token["id"]: token for token in files.definition["added_tokens"]}
    ids = {id: token for token, id in model["vocab"].items()} | {id: token["content"] for id, token in added.items()}
    named, lost_padding = _within(files.named, ids, vocab_size)
    kept = [token for id, token in added.items() if id < vocab_size]
    strips, keeps_blanks = blank_rule(kept, set(ids.values()), files.templates.values())
    check_found_anywhere(kept, definition)
    tokens = [ids.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    special, lost_ends = _special_tokens(files, named, tokens)
    add_bos, add_eos = _adds(files.backend, special)
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    return Vocabulary(
        definition,
        tokens,
        types=[_type(ids.get(i), added.get(i), i == named.get("unk"), definition.model) for i in range(vocab_size)],
        merges=[" ".join(m) for m in merges] if definition.model == "gpt2" else None,
        scores=merge_scores(tokens, merges) if definition.model == "llama" else None,
        special=special,
        add_bos=add_bos,
        add_eos=add_eos,
        templates=files.templates,
        strips=strips,
        keeps_blanks=keeps_blanks,
        losses=(*lost_padding, *lost_ends),
        backend=files.backend,
    )


def merge_scores(tokens: list[str], merges: list[tuple[str, ...]]) -> list[float]:
    """Scores under which merging the best-scored neighbours first repeats BPE by merge rank: minus the first rank that yields the token.

    Tokens that no merge yields (single characters, bytes, special tokens) come last.
    """
    rank: dict[str, int] = {}
    for i, pair in enumerate(merges):
        rank.setdefault("".join(pair), i)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _within(named: dict[str, int], ids: dict[int, str], vocab_size: int) -> tuple[dict[str, int], tuple[str, ...]]:
    """The named tokens that have a row in the embedding, and what is left out. Only padding may lack one: a mask hides it from the model."""
    beyond = [id for id in ids if id >= vocab_size]
    if not beyond:
        return named, ()
    roles = {id: [name for name, at in named.items() if at == id] for id in beyond}
    if used := [id for id in beyond if roles[id] != ["pad"]]:
        raise Incompatible(
            f"token {ids[used[0]]!r} has the id {used[0]}, but the embedding has only {vocab_size} rows: the model cannot read it; enlarge "
            "the embedding (resize_token_embeddings) or take the token out of tokenizer.json",
            key="model",
        )
    pad = named["pad"]
    loss = f"the padding token {ids[pad]!r} is left out: its id {pad} is beyond the {vocab_size} rows of the embedding"
    return {name: id for name, id in named.items() if id != pad}, (loss,)


def _special_tokens(files: TokenizerFiles, named: dict[str, int], tokens: list[str]) -> tuple[dict[str, int], tuple[str, ...]]:
    if "eos" not in named:  # llama.cpp would take token 11 for it
        raise Incompatible("neither the tokenizer nor config.json names an end-of-text token (eos_token); llama.cpp needs one", key="model")
    more, lost = end_tokens(files.ends, named["eos"], tokens)
    words = f"GGUF has room for two more ends of text than eos, so generation does not stop at {', '.join(lost)}"
    return {"bos": named["eos"], **named, **more}, (words,) if lost else ()


def _adds(backend: Tokenizer, special: dict[str, int]) -> tuple[bool, bool]:
    """Whether the post-processor puts begin and end of text around a text, seen by letting it."""
    bare = backend.encode("a", add_special_tokens=False).ids
    full = backend.encode("a", add_special_tokens=True).ids
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
