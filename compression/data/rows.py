"""Text and questions as token rows: one policy for BOS, EOS, chat templates and truncation, everywhere.

- A text document is encoded with the tokenizer's own special tokens (BOS where it adds one) and ended with EOS.
- A row is packed from whole documents: it begins with the beginning of a document and the last one is cut at its end; what was
  cut off is dropped, except that a document longer than a row fills further rows of its own while it can. No row is padded.
- The prompt of a question is "{passage}\\nQuestion: {question}\\nAnswer:", its answer " {choice}". Where the tokenizer has a chat
  template, the prompt is a user's turn rendered by it (behind `system`, where the recipe gives one), and the answer follows without the blank.
  Such a model is also calibrated on the training questions, rendered in this way, next to the text. Plain text is never templated.
- Prompt and answer are context and continuation as in lm-evaluation-harness (`encode_pairs`): after what the tokenizer puts in front (BOS),
  which is not added twice, and without what it appends (EOS): an EOS would end the prompt that the model is to continue.
- A question that is too long loses the beginning of its prompt, as in lm-evaluation-harness; answers are never cut.
- Perplexity on the user's text follows the WikiText protocol: the test text as one string, tokenized once with the tokenizer's own
  special tokens, non-overlapping windows from the start, the remainder dropped. On the embedded world, whose model was trained on
  packed rows, the windows are packed rows of the test split.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice, takewhile
from operator import itemgetter
from typing import TYPE_CHECKING

from compression.data.sources import documents, questions, running_text, stream_documents
from compression.data.spec import DataSpec, Split, outside
from compression.data.templates import conversation, refusals
from compression.errors import UnusableData, UnusableModel
from compression.reference.world import Question

if TYPE_CHECKING:  # planning reads this package without paying for torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


def training_rows(spec: DataSpec, tokenizer: "PreTrainedTokenizerBase", split: Split = "train") -> "Tensor":
    """Return packed rows of a split's documents in their order, int64 [rows, length].

    Raises:
        UnusableData: As `documents` does, or the text does not fill one row.
    """
    texts = documents(spec, split)
    rows = list(pack((encode_document(tokenizer, text) for text in texts), spec.length))
    if not rows:
        raise no_row(spec, split)
    return _tensor(rows)


def no_row(spec: DataSpec, split: Split) -> UnusableData:
    return UnusableData(f"the {split} text fills no row of {spec.length} tokens; give more text or a smaller length", key="length")


def question_rows(spec: DataSpec, tokenizer: "PreTrainedTokenizerBase", split: Split = "train") -> "tuple[Tensor, Tensor]":
    """Return questions with their right answers for training, one a row: tokens int64 [questions, longest], answer mask bool of the same shape.

    The mask is True at the answer's tokens and its EOS: a label is `tokens` where the mask is True and -100 elsewhere. Rows are
    padded on the right, under a False mask, to the longest, which is at most `length`.

    Raises:
        UnusableData: As `questions` does, or the spec names no questions.
    """
    import torch

    found = questions(spec, split)
    if not found:
        raise UnusableData("the data names no questions to train on; give data.questions", key="questions")
    examples = [encode_example(tokenizer, question, spec) for question in found]
    longest = max(len(prompt) + len(answer) for prompt, answer in examples)
    padding = tokenizer.eos_token_id or 0  # stands in the rows anyway; a pad token may have no row in the embedding
    rows = torch.full((len(examples), longest), padding, dtype=torch.long)
    mask = torch.zeros_like(rows, dtype=torch.bool)
    for i, (prompt, answer) in enumerate(examples):
        end = len(prompt) + len(answer)
        rows[i, :end] = torch.tensor(prompt + answer)
        mask[i, len(prompt) : end] = True
    return rows, mask


def calibration_windows(spec: DataSpec, tokenizer: "PreTrainedTokenizerBase", seed: int) -> "Tensor":
    """Return packed rows of training documents in an order drawn from `seed`, int64 [calibration_windows, length].

    Raises:
        UnusableData: As `documents` does, or the training text does not fill as many windows.
    """
    return _tensor(calibration_rows(spec, tokenizer, seed))


def calibration_rows(spec: DataSpec, tokenizer: "PreTrainedTokenizerBase", seed: int) -> list[list[int]]:
    """Return the rows of `calibration_windows` as lists."""
    items: list[str | Question] = list(documents(spec, "train"))
    if tokenizer.chat_template is not None and spec.questions is not None:
        items += questions(spec, "train")
    random.Random(f"calibration-{seed}").shuffle(items)
    encoded = (encode_document(tokenizer, i) if isinstance(i, str) else [*chain(*_example(tokenizer, i, spec.system))] for i in items)
    rows = list(islice(pack(encoded, spec.length), spec.calibration_windows))
    if len(rows) < spec.calibration_windows:
        raise UnusableData(
            f"the training text fills only {len(rows)} windows of {spec.length} tokens, not {spec.calibration_windows}",
            key="calibration_windows",
        )
    return rows


def evaluation_windows(spec: DataSpec, tokenizer: "PreTrainedTokenizerBase") -> "Tensor":
    """Return windows of the test text for perplexity and KL, int64 [at most evaluation_windows, length], by the protocol above.

    Raises:
        UnusableData: As `documents` does, or the test text does not fill one window.
    """
    return _tensor(evaluation_rows(spec, tokenizer))


def evaluation_rows(spec: DataSpec, tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """Return the rows of `evaluation_windows` as lists."""
    if (source := outside(spec.text)) is None:
        packed = pack((encode_document(tokenizer, text) for text in stream_documents(spec, "test")), spec.length)
        rows = list(islice(packed, spec.evaluation_windows))
    else:
        tokens = tokenizer(running_text(source, "test"), verbose=False)["input_ids"]
        rows = [tokens[i : i + spec.length] for i in range(0, len(tokens) - spec.length + 1, spec.length)][: spec.evaluation_windows]
    if not rows:
        raise UnusableData(f"the test text fills no window of {spec.length} tokens; give more text or a smaller length", key="length")
    return rows


def encode_document(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Encode a text document: with the tokenizer's own special tokens, ended with EOS where it has one."""
    tokens = list(tokenizer(text, verbose=False)["input_ids"])
    if tokenizer.eos_token_id is not None and tokens[-1:] != [tokenizer.eos_token_id]:
        tokens.append(tokenizer.eos_token_id)
    return tokens


def pack(encoded: Iterable[list[int]], length: int) -> Iterator[list[int]]:
    """Yield rows of exactly `length` tokens, each from the beginning of a document or from inside a longer one."""
    row: list[int] = []
    for tokens in encoded:
        row = row + tokens
        if len(row) < length:
            continue
        full = len(row) // length
        yield from (row[i * length : (i + 1) * length] for i in range(full))
        row = []


def prompts_of(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", count: int) -> list[list[int]]:
    """Return the first `count` tokens of each text that is long enough, without special tokens. Raises UnusableData where none is."""
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    prompts = [tokens[:count] for tokens in encoded if len(tokens) >= count]
    if not prompts:
        raise no_prompt(count)
    return prompts


def no_prompt(count: int) -> UnusableData:
    return UnusableData(f"no training document has {count} tokens to prompt with", key="prompt_tokens")


def start_token(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the token before a document: BOS where the tokenizer puts it there, else EOS, which ends the previous document in a packed row.

    Raises:
        UnusableModel: The tokenizer has neither.
    """
    adds_bos = tokenizer.bos_token_id in tokenizer("", verbose=False)["input_ids"]
    token = tokenizer.bos_token_id if adds_bos or tokenizer.eos_token_id is None else tokenizer.eos_token_id
    if token is None:
        raise UnusableModel(
            "the tokenizer has neither BOS nor EOS, so nothing says where a document begins; name one in tokenizer_config.json", key="model"
        )
    return int(token)


def prompt(question: Question, tokenizer: "PreTrainedTokenizerBase", system: str | None = None) -> str:
    """Return the prompt of a question as text, rendered by the tokenizer's chat template where there is one, after the system message if one is given.

    Raises:
        UnusableData: The template refuses; with its own message.
    """
    body = f"{question.passage}\nQuestion: {question.question}\nAnswer:".lstrip("\n")
    if tokenizer.chat_template is None:
        return body
    with refusals(system):
        return str(tokenizer.apply_chat_template(conversation(body, system), tokenize=False, add_generation_prompt=True))


def encode_choices(
    tokenizer: "PreTrainedTokenizerBase", question: Question, system: str | None = None
) -> list[tuple[list[int], list[int]]]:
    """Return (context tokens, continuation tokens) of each choice of a question. Raises UnusableData as `encode_pairs` and `prompt` do."""
    return _encode_answers(tokenizer, question, question.choices, system)


def encode_pairs(tokenizer: "PreTrainedTokenizerBase", context: str, continuations: Sequence[str]) -> list[tuple[list[int], list[int]]]:
    """Return (context tokens, continuation tokens) for each continuation, by the rule of lm-evaluation-harness (`_encode_pair`).

    Blanks at the end of the context belong to the continuation. Both are encoded as one text, and the continuation is what follows as many
    tokens as the context has alone. A continuation that merges completely into the context's last token leaves nothing there (the harness stops
    with an assertion): it is encoded alone.

    Raises:
        UnusableData: The tokenizer makes no token of a continuation.
    """
    bare = context.rstrip()
    blanks = context[len(bare) :]
    first, *wholes = encode_prompts(tokenizer, [bare, *(context + continuation for continuation in continuations)])
    pairs = []
    for continuation, whole in zip(continuations, wholes, strict=True):
        own = whole[len(first) :] or list(tokenizer(blanks + continuation, add_special_tokens=False, verbose=False)["input_ids"])
        if not own:
            raise UnusableData(f"the tokenizer makes no token of {continuation!r}, which is to follow a prompt", key="questions")
        pairs.append((first, own))
    return pairs


def encode_prompts(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    """Encode texts that a model is to continue: after what the tokenizer puts in front, once, and without what it appends."""
    marked = tokenizer("a", return_special_tokens_mask=True, verbose=False)
    front = [token for token, _ in takewhile(itemgetter(1), zip(marked["input_ids"], marked["special_tokens_mask"], strict=True))]
    bodies = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return [body if body[: len(front)] == front else front + body for body in bodies]


def _example(tokenizer: "PreTrainedTokenizerBase", question: Question, system: str | None) -> tuple[list[int], list[int]]:
    """Return (prompt tokens, tokens of the right answer and EOS)."""
    ((context, answer),) = _encode_answers(tokenizer, question, [question.choices[question.answer]], system)
    eos = [] if tokenizer.eos_token_id is None or answer[-1:] == [tokenizer.eos_token_id] else [tokenizer.eos_token_id]
    return context, answer + eos


def _encode_answers(
    tokenizer: "PreTrainedTokenizerBase", question: Question, answers: Sequence[str], system: str | None
) -> list[tuple[list[int], list[int]]]:
    blank = " " if tokenizer.chat_template is None else ""
    return encode_pairs(tokenizer, prompt(question, tokenizer, system), [blank + answer for answer in answers])


def encode_example(tokenizer: "PreTrainedTokenizerBase", question: Question, spec: DataSpec) -> tuple[list[int], list[int]]:
    """Return (prompt tokens, tokens of the right answer and EOS) for training, `length` at most. Raises UnusableData as `question_rows` does."""
    return _truncate(*_example(tokenizer, question, spec.system), spec.length)


def _truncate(context: list[int], answer: list[int], length: int) -> tuple[list[int], list[int]]:
    if len(answer) >= length:
        raise UnusableData(f"an answer of {len(answer)} tokens leaves no room for its question in {length}; raise length", key="length")
    return context[-(length - len(answer)) :], answer


def _tensor(rows: list[list[int]]) -> "Tensor":
    import torch

    return torch.tensor(rows, dtype=torch.long)
