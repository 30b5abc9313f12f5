"""Check before any work that data fill the rows that a stage needs. Imports no torch.

Text is encoded with the model's own tokenizer, and only as much of it as decides. What is refused here the stage would refuse: in doubt all is encoded,
exactly as the stage would.
"""

from collections.abc import Iterable
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from compression.data.plain import plain_tokenizer
from compression.data.rows import (
    calibration_rows,
    encode_choices,
    encode_document,
    encode_example,
    evaluation_rows,
    no_prompt,
    no_row,
    pack,
)
from compression.data.sources import questions, stream_documents
from compression.data.spec import DataSpec, Split, outside
from compression.errors import UnusableData
from compression.reference.world import Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_QUESTIONS = 20  # that are encoded; others differ in their content alone
_SPARE = 16  # tokens by which the end of a text that is cut may differ


def check_evaluation(spec: DataSpec, directory: Path, vocabulary: int) -> None:
    """Raise UnusableData where the test text fills no window, where test questions cannot be encoded, and as `check_known` does."""
    tokenizer = plain_tokenizer(directory)
    tokens = _beginning(spec, tokenizer) or evaluation_rows(spec.model_copy(update={"evaluation_windows": 1}), tokenizer)[0]
    check_known(tokens, vocabulary, directory)
    for question in _first_questions(spec, "test"):
        for context, choice in encode_choices(tokenizer, question, spec.system):
            check_known([*context, *choice], vocabulary, directory)


def _beginning(spec: DataSpec, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the first tokens of the test text, more than a window of them; none where they must be counted exactly."""
    if outside(spec.text) is None:
        return []
    text, size = "", 16 * spec.length
    for document in stream_documents(spec, "test"):
        text += f"{document}\n\n"  # blank records, which are left out here, only add to the running text
        if len(text) >= size:
            if len(tokens := tokenizer(text, verbose=False)["input_ids"]) >= spec.length + _SPARE:
                return list(tokens)
            size = 4 * len(text)
    return []


def check_calibration(spec: DataSpec, directory: Path, vocabulary: int, seed: int) -> None:
    """Raise UnusableData where the training text does not fill the calibration windows, and as `check_known` does."""
    largest = _plenty(spec.model_dump_json(), directory)
    rows = calibration_rows(spec, plain_tokenizer(directory), seed) if largest is None else [[largest]]
    for row in rows:
        check_known(row, vocabulary, directory)


@lru_cache(maxsize=64)  # the stages of a sweep need the same
def _plenty(document: str, directory: Path) -> int | None:
    """Return the largest token of enough training text to fill the calibration windows with any seed; None where there is less.

    Twice as many rows in the order of the file are enough: in no order does a row cost the tokens of more than two.
    """
    spec = DataSpec.model_validate_json(document)
    tokenizer = plain_tokenizer(directory)
    encoded = (encode_document(tokenizer, text) for text in stream_documents(spec, "train"))
    rows = list(islice(pack(encoded, spec.length), 2 * spec.calibration_windows))
    return max(map(max, rows)) if len(rows) == 2 * spec.calibration_windows else None


def check_training(spec: DataSpec, directory: Path, vocabulary: int, *, on_questions: bool, split: Split = "train") -> None:
    """Raise UnusableData where a split's text fills no row, where its questions cannot be encoded, and as `check_known` does."""
    tokenizer = plain_tokenizer(directory)
    if on_questions:
        for question in _first_questions(spec, split):
            check_known([token for part in encode_example(tokenizer, question, spec) for token in part], vocabulary, directory)
        return
    row = next(pack((encode_document(tokenizer, text) for text in stream_documents(spec, split)), spec.length), None)
    if row is None:
        raise no_row(spec, split)
    check_known(row, vocabulary, directory)


def check_prompts(spec: DataSpec, directory: Path, count: int) -> None:
    """Raise UnusableData where no training document has `count` tokens to prompt with."""
    tokenizer = plain_tokenizer(directory)
    if not any(len(tokenizer(text, add_special_tokens=False)["input_ids"]) >= count for text in stream_documents(spec, "train")):
        raise no_prompt(count)


def _first_questions(spec: DataSpec, split: Split) -> list[Question]:
    most = {name: min(getattr(spec, name) or _QUESTIONS, _QUESTIONS) for name in ("train_questions", "evaluation_questions")}
    return questions(spec.model_copy(update=most), split)


def check_known(tokens: Iterable[int], vocabulary: int, directory: Path) -> None:
    """Raise UnusableData for a token that has no row in the embedding of `vocabulary` rows of the model in `directory`."""
    if (token := max(tokens, default=0)) >= vocabulary:
        raise unknown_token(token, vocabulary, directory)


def unknown_token(token: int, vocabulary: int, directory: Path) -> UnusableData:
    """Return the error that names a token: a token of the model's own tokenizer needs a row, an unknown one comes from another tokenizer."""
    spelling = plain_tokenizer(directory).convert_ids_to_tokens(token) if token >= 0 else None
    if spelling is None:
        remedy = "the tokenizer of the model does not know it either: tokenize with the tokenizer of the model"
    else:
        remedy = (
            f"the tokenizer got {spelling!r} without a row there: enlarge the embedding (transformers: resize_token_embeddings), "
            "or take the token out of the tokenizer or the data"
        )
    return UnusableData(f"the data hold the token {token}, and the embedding of {directory} has only {vocabulary} rows; {remedy}")
