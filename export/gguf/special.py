"""What llama.cpp (src/llama-vocab.cpp, as of llama-cpp-python 0.3.36) makes of tokens that stand outside the merges. Imports no torch.

It cuts a text at the spelling of each of them and tokenizes what is between. A file cannot say that a token swallows the blanks around it:
llama.cpp knows that of Phi-3's tokens, which it finds by the model's name.
"""

import re
from collections.abc import Iterable
from typing import Any

from compression.errors import Incompatible
from export.gguf.pretokenizer import Definition

STRIPPING_NAMES = ("phi-3", "phi3")  # a `general.name` with one of these has the tokens of `blank_rule` swallow the blanks behind them
STRIPPING_TOKENS = {"</s>", "<unk>", "<s>", "<|endoftext|>"}  # and llama.cpp opens no such file that lacks one of these
_NEVER_STRIPPED = STRIPPING_TOKENS - {"</s>"}
OTHER_NAMES = ("modern-bert",)  # another rule of that kind, which no file written here means

# Spellings that end a text, whatever the file says.
ENDS = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>", "<|endoftext|>", "</s>",
    "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>",
    "<｜end▁of▁sentence｜>", "[e~[",
})  # fmt: skip


def blank_rule(added: list[dict[str, Any]], spellings: set[str], templates: Iterable[str]) -> tuple[bool, frozenset[str]]:
    """How tokens that swallow the blanks behind them are written: (by llama.cpp's rule for Phi-3, tokens behind which it keeps blanks).

    added      `added_tokens` of tokenizer.json
    spellings  every token of the vocabulary
    templates  chat templates: one that puts blanks behind such a token needs them swallowed
    Raises Incompatible where llama.cpp's rule does not fit and a template needs it, for tokens that swallow blanks in front of them, and for
    those that are found only as whole words.
    """
    for flag, what in (("single_word", "is a token only as a whole word"), ("lstrip", "swallows the blanks in front of it")):
        if token := next((token["content"] for token in added if token[flag]), None):
            raise Incompatible(
                f"the token {token!r} {what} ({flag} in tokenizer.json), which llama.cpp cannot do; export.onnx can", key="model"
            )
    found = {token["content"] for token in added if token["rstrip"]}
    ours = {token["content"] for token in added} - _NEVER_STRIPPED | {"</s>"}
    if found == ours and spellings >= STRIPPING_TOKENS:
        return True, frozenset()
    if token := next((token for token in sorted(found) if any(_is_before_blanks(token, template) for template in templates)), None):
        raise Incompatible(
            f"the chat template puts blanks behind {token!r}, which swallows them (rstrip in tokenizer.json); llama.cpp does that for Phi-3's "
            f"tokens only, a vocabulary with {', '.join(sorted(STRIPPING_TOKENS))} in which every added token but "
            f"{', '.join(sorted(_NEVER_STRIPPED))} does; take them out of the template, which changes no token, or take export.onnx",
            key="model",
        )
    return False, frozenset(found)


def _is_before_blanks(token: str, template: str) -> bool:
    """Whether a template may put a blank behind a token: its last two characters are looked for, as the rest may be the name of a role."""
    return re.search(re.escape(token[-2:]) + r"(\s|\\[nrt])", template) is not None


def check_found_anywhere(added: list[dict[str, Any]], definition: Definition) -> None:
    """Raises Incompatible for tokens that the tokenizer looks for in the normalized text, where a space was put in front of them as well."""
    lost = [token["content"] for token in added if token["normalized"] and not token["content"].startswith("▁")]
    if definition.prepend == "always" and lost:
        raise Incompatible(
            f"the tokens {', '.join(lost[:4])} are looked for in the normalized text (normalized in tokenizer.json), which is where this "
            "tokenizer puts a space in front: it finds them behind a space only, and llama.cpp everywhere; set normalized to false, if the "
            "model was trained so, or take export.onnx",
            key="model",
        )


def end_tokens(ends: tuple[int, ...], eos: int, tokens: list[str]) -> tuple[dict[str, int], list[str]]:
    """How the ends of text besides `eos` are written: (ids of `eot` and `eom`, spellings of those that llama.cpp will not know).

    ends  ids that end a text when generating; llama.cpp knows some by their spelling
    """
    left = [id for id in ends if id != eos and id < len(tokens) and tokens[id] not in ENDS]
    return dict(zip(("eot", "eom"), left, strict=False)), [tokens[id] for id in left[2:]]


def model_name(name: str, strips: bool) -> str:
    """A `general.name` that switches llama.cpp's rule for Phi-3's tokens on or off, as they need."""
    for other in OTHER_NAMES:
        name = _respell(name, other)
    if strips:
        return name if any(part in name.lower() for part in STRIPPING_NAMES) else f"{name} (Phi-3 tokens)"
    for part in STRIPPING_NAMES:
        name = _respell(name, part)
    return name


def _respell(name: str, part: str) -> str:
    """`name` without `part` in it, in any case: "Phi-4, not phi3" becomes "Phi-4, not phi 3"."""
    at = name.lower().find(part)
    if at < 0:
        return name
    end = at + len(part)
    apart = name[at:end].replace("-", " ") if "-" in part else f"{name[at : end - 1]} {name[end - 1 : end]}"
    return name[:at] + apart + _respell(name[end:], part)
