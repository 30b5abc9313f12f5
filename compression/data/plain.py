"""A model directory's tokenizer without transformers, which imports torch: what planning encodes text with."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from compression.data.templates import Conversation, chat_template, render, special_tokens
from compression.errors import UnusableModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PlainTokenizer:
    """tokenizer.json with the calls that compression/data/rows.py makes of a transformers tokenizer. Raises UnusableModel for a damaged file."""

    def __init__(self, directory: Path):
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        except Exception as error:  # noqa: BLE001  tokenizers raises nothing narrower
            raise UnusableModel(f"{directory / 'tokenizer.json'} cannot be opened: {error}", key="model") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._special = special_tokens(directory)
        self.chat_template = chat_template(directory)
        self.bos_token_id, self.eos_token_id = (self._id(self._special[name]) for name in ("bos_token", "eos_token"))

    def __call__(self, text: str | Sequence[str], *, add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
        """`input_ids` and `special_tokens_mask`, of one text or of several."""
        one = isinstance(text, str)
        found = self._tokenizer.encode_batch([text] if one else list(text), add_special_tokens=add_special_tokens)
        columns = {"input_ids": [each.ids for each in found], "special_tokens_mask": [each.special_tokens_mask for each in found]}
        return {name: column[0] if one else column for name, column in columns.items()}

    def apply_chat_template(self, messages: Conversation, **_: Any) -> str:
        assert self.chat_template is not None  # else nobody asks
        return render(self.chat_template, messages, self._special)

    def convert_ids_to_tokens(self, token: int) -> str | None:
        return self._tokenizer.id_to_token(token)

    def _id(self, text: str) -> int | None:
        return self._tokenizer.token_to_id(text) if text else None


def plain_tokenizer(directory: Path) -> "PreTrainedTokenizerBase":
    """For functions that are annotated with transformers' tokenizer, of which they need what `PlainTokenizer` has."""
    return cast("PreTrainedTokenizerBase", _opened(directory, (directory / "tokenizer.json").stat().st_mtime_ns))


@lru_cache(maxsize=4)  # opening a vocabulary of 150,000 takes a second
def _opened(directory: Path, _modified: int) -> PlainTokenizer:
    return PlainTokenizer(directory)
