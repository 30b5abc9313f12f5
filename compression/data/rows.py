"""Text and questions as token rows: one policy for BOS, EOS, chat templates and truncation, everywhere.

- A text document is encoded with the tokenizer's own special tokens (BOS where it adds one) and ended with EOS.
- A row is packed from whole documents: it begins with the beginning of a document and the last one is cut at its end; what was
  cut off is dropped, except that a document longer than a row fills further rows of its own while it can. No row is padded.
- A question is asked as "{passage}\\nQuestion: {question}\\nAnswer:" and answered with " {choice}". Where the tokenizer has a chat
  template, the prompt is a user's turn rendered by it, the answer follows without the blank, and no special token is added again.
  Such a model is also calibrated on the training questions, rendered in this way, next to the text. Plain text is never templated.
- What is too long for a question loses the beginning of its prompt, as in lm-evaluation-harness; answers are never cut.
- Perplexity on the user's text follows the WikiText protocol: the test text as one string, tokenized once with the tokenizer's own
  special tokens, non-overlapping windows from the start, the remainder dropped. On the embedded world, whose model was trained on
  packed rows, the windows are packed rows of the test split.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING

from compression.data.sources import documents, questions, running_text, stream_documents
from compression.data.spec import DataSpec, Split
from compression.errors import UnusableData
from compression.reference.world import Question

if TYPE_CHECKING:  # planning reads this package without paying for torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


def training_rows(spec: DataSpec, tokenizer: "PreTrainedTokenizerBase", split: Split = "train") -> "Tensor":
    """Packed rows of a split's documents in their order, int64 [rows, length].

    Raises UnusableData as `documents` does, and when the text does not fill one row.
    """
    texts = documents(spec, split)
    rows = list(pack((encode_document(tokenizer, text) for text in texts), spec.length))
    if not rows:
        raise UnusableData(f"the {split} text fills no row of {spec.length} tokens; give more text or a smaller length", key="length")
    return _tensor(rows)


def question_rows(spec: DataSpec, tokenizer: "PreTrainedTokenizerBase", split: Split = "train") -> "tuple[Tensor, Tensor]":
    """Questions with their right answers for training, one a row: tokens int64 [questions, longest], answer mask bool of the same shape.

    The mask is True at the answer's tokens and its EOS: a label is `tokens` where the mask is True and -100 elsewhere. Rows are
    padded on the right, under a False mask, to the longest, which is at most `length`.
    Raises UnusableData as `questions` does, and when the spec names no questions.
    """
    import torch

    asked = questions(spec, split)
    if not asked:
        raise UnusableData("the data names no questions to train on; give data.questions", key="questions")
    examples = [_truncate(*_example(tokenizer, q), spec.length) for q in asked]
    longest = max(len(prompt) + len(answer) for prompt, answer in examples)
    padding = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    rows = torch.full((len(examples), longest), padding, dtype=torch.long)
    mask = torch.zeros_like(rows, dtype=torch.bool)
    for i, (prompt, answer) in enumerate(examples):
        end = len(prompt) + len(answer)
        rows[i, :end] = torch.tensor(prompt + answer)
        mask[i, len(prompt) : end] = True
    return rows, mask


def calibration_windows(spec: DataSpec, tokenizer: "PreTrainedTokenizerBase", seed: int) -> "Tensor":
    """Packed rows of training documents in an order drawn from `seed`, int64 [calibration_windows, length].

    Raises UnusableData as `documents` does, and when the training text does not fill as many windows.
    """
    items: list[str | Question] = list(documents(spec, "train"))
    if tokenizer.chat_template is not None and spec.questions is not None:
        items += questions(spec, "train")
    random.Random(f"calibration-{seed}").shuffle(items)
    encoded = (encode_document(tokenizer, i) if isinstance(i, str) else [*chain(*_example(tokenizer, i))] for i in items)
    rows = list(islice(pack(encoded, spec.length), spec.calibration_windows))
    if len(rows) < spec.calibration_windows:
        raise UnusableData(
            f"the training text fills only {len(rows)} windows of {spec.length} tokens, not {spec.calibration_windows}",
            key="calibration_windows",
        )
    return _tensor(rows)


def evaluation_windows(spec: DataSpec, tokenizer: "PreTrainedTokenizerBase") -> "Tensor":
    """Windows of the test text for perplexity and KL, int64 [at most evaluation_windows, length], by the protocol above.

    Raises UnusableData as `documents` does, and when the test text does not fill one window.
    """
    if spec.text == "embedded":
        packed = pack((encode_document(tokenizer, text) for text in stream_documents(spec, "test")), spec.length)
        rows = list(islice(packed, spec.evaluation_windows))
    else:
        tokens = tokenizer(running_text(spec.text, "test"), verbose=False)["input_ids"]
        rows = [tokens[i : i + spec.length] for i in range(0, len(tokens) - spec.length + 1, spec.length)][: spec.evaluation_windows]
    if not rows:
        raise UnusableData(f"the test text fills no window of {spec.length} tokens; give more text or a smaller length", key="length")
    return _tensor(rows)


def encode_document(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Token ids of a text document: with the tokenizer's own special tokens, ended with EOS where it knows one."""
    tokens = list(tokenizer(text, verbose=False)["input_ids"])
    if tokenizer.eos_token_id is not None and tokens[-1:] != [tokenizer.eos_token_id]:
        tokens.append(tokenizer.eos_token_id)
    return tokens


def pack(encoded: Iterable[list[int]], length: int) -> Iterator[list[int]]:
    """Rows of exactly `length` tokens from encoded documents, each beginning with the beginning of a document or inside a longer one."""
    row: list[int] = []
    for tokens in encoded:
        row = row + tokens
        if len(row) < length:
            continue
        full = len(row) // length
        yield from (row[i * length : (i + 1) * length] for i in range(full))
        row = []


def prompt(question: Question, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The prompt of a question as text, rendered by the tokenizer's chat template where there is one."""
    body = f"{question.passage}\nQuestion: {question.question}\nAnswer:".lstrip("\n")
    if tokenizer.chat_template is None:
        return body
    return str(tokenizer.apply_chat_template([{"role": "user", "content": body}], tokenize=False, add_generation_prompt=True))


def encode_choices(tokenizer: "PreTrainedTokenizerBase", question: Question) -> list[tuple[list[int], list[int]]]:
    """(prompt tokens, answer tokens) of each choice of a question.

    Prompt and answer are encoded as one text and divided where the prompt alone ends, as in lm-evaluation-harness, so that
    the tokens are those the model would have read in running text.
    """
    return _encode_answers(tokenizer, question, question.choices)


def _example(tokenizer: "PreTrainedTokenizerBase", question: Question) -> tuple[list[int], list[int]]:
    """(prompt tokens, tokens of the right answer and EOS)."""
    ((asked, answer),) = _encode_answers(tokenizer, question, [question.choices[question.answer]])
    eos = [] if tokenizer.eos_token_id is None or answer[-1:] == [tokenizer.eos_token_id] else [tokenizer.eos_token_id]
    return asked, answer + eos


def _encode_answers(tokenizer: "PreTrainedTokenizerBase", question: Question, answers: Sequence[str]) -> list[tuple[list[int], list[int]]]:
    templated = tokenizer.chat_template is not None
    text = prompt(question, tokenizer)
    texts = [text, *(text + ("" if templated else " ") + answer for answer in answers)]
    start, *wholes = tokenizer(texts, add_special_tokens=not templated, verbose=False)["input_ids"]
    return [(whole[: len(start)], whole[len(start) :]) for whole in wholes]


def _truncate(asked: list[int], answer: list[int], length: int) -> tuple[list[int], list[int]]:
    if len(answer) >= length:
        raise UnusableData(f"an answer of {len(answer)} tokens leaves no room for its question in {length}; raise length", key="length")
    return asked[-(length - len(answer)) :], answer


def _tensor(rows: list[list[int]]) -> "Tensor":
    import torch

    return torch.tensor(rows, dtype=torch.long)
