"""What llama.cpp's tokenizer is tried on."""

import unicodedata

from compression.checkpoints.tokenizer_corpus import TEXTS, every_two_byte_character
from export.gguf.pretokenizer import SPACE
from export.gguf.tokenizer import TokenType, Vocabulary


def tokenizer_corpus(vocabulary: Vocabulary) -> list[str]:
    """The texts above, one of every two-byte character, and every special token alone and between words.

    Left out is what llama.cpp cannot do and the export warns of: texts that are not composed, where the tokenizer composes to NFC;
    combining marks and capital letters beyond ASCII, where it splits words otherwise; leading spaces and text after a special token, where the
    tokenizer prepends a space as Metaspace does; blanks behind tokens that swallow them.
    """
    texts = [*TEXTS, *every_two_byte_character()]
    specials, metaspace = special_texts(vocabulary), vocabulary.definition.prepend == "metaspace"
    texts += [text for token in specials for text in (token, f"word{token}")]
    if metaspace:
        return [text for text in texts if not text.startswith((" ", SPACE))]
    texts += [f"one{token}two" for token in specials]
    texts += [f"one {token} two\n{token}" for token in specials if token not in vocabulary.keeps_blanks]
    if vocabulary.definition.composes:
        texts = [unicodedata.normalize("NFC", text) for text in texts]
    return ["".join(_exact(character, vocabulary.definition.inexact) for character in text) for text in texts]


def _exact(character: str, inexact: frozenset[str]) -> str:
    """A character of a text, or what stands for it where llama.cpp splits words otherwise at it."""
    if character.isascii():
        return character
    if "capitals" in inexact:
        character = character.lower()
    left_out = (*(("M",) if "marks" in inexact else ()), *(("Lu", "Lt") if "capitals" in inexact else ()))
    return "".join(part for part in character if not unicodedata.category(part).startswith(left_out))


def special_texts(vocabulary: Vocabulary) -> list[str]:
    """Tokens that stand outside the merges."""
    outside = (TokenType.CONTROL, TokenType.USER_DEFINED)
    return [token for token, type in zip(vocabulary.tokens, vocabulary.types, strict=True) if type in outside]
