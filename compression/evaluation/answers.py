"""Question answering: exact match and F1 of words (SQuAD's metrics) of written answers. Imports no torch.

A line of a .jsonl file is SQuAD's: {"context": ..., "question": ..., "answers": {"text": [...]}}; answers may be a plain list too, and context
be left out. The prompt is "{context}\\nQuestion: {question}\\nAnswer:" (compression/evaluation/writing.py), and the answer ends with its line.
"""

import random
import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from compression.context import Context
from compression.data.sources import file_records
from compression.errors import UnusableData
from compression.evaluation.findings import Findings, Items
from compression.evaluation.sanity import means
from compression.evaluation.spec import EMBEDDED
from compression.evaluation.writing import Writer
from compression.reference import world

EMBEDDED_ITEMS = 60
SHOWN = 20
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class OpenQuestion:
    """A question whose answer is written, not chosen; any of `answers` is right."""

    context: str
    question: str
    answers: tuple[str, ...]

    @property
    def prompt(self) -> str:
        return f"{self.context}\nQuestion: {self.question}\nAnswer:".lstrip("\n")


def open_questions(source: str, limit: int | None = None) -> Iterator[OpenQuestion]:
    """Yield the questions of a .jsonl file, or the embedded ones, `limit` at most.

    Raises:
        UnusableData: With file and line: no such file, no JSON, another shape.
    """
    if source == EMBEDDED:
        return islice(_embedded(), limit or EMBEDDED_ITEMS)
    return islice((_question(place, record) for place, record in file_records(existing_jsonl(source, "question_answering"), None)), limit)


def existing_jsonl(source: str, key: str) -> Path:
    """Return the path of a .jsonl file. Raises UnusableData, naming the parameter `key`, where there is none."""
    path = Path(source)
    if not path.is_file():
        raise UnusableData(f"there is no file {path}", key=key)
    if path.suffix != ".jsonl":
        raise UnusableData(f"{path} must be a .jsonl file: one JSON object a line", key=key)
    return path


def normalize(text: str) -> str:
    """Normalise as SQuAD does: lower case, no (ASCII) punctuation, no articles, single blanks."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, truths: Sequence[str]) -> float:
    """Return 1 if the normalised answer is one of the normalised truths, else 0."""
    return float(normalize(answer) in {normalize(truth) for truth in truths})


def f1(answer: str, truths: Sequence[str]) -> float:
    """Return the best F1 of normalised words over the truths: 2pr/(p+r) of the words in common, each as often as both have it."""
    return max(_f1(normalize(answer).split(), normalize(truth).split()) for truth in truths)


def _f1(answer: list[str], truth: list[str]) -> float:
    if not answer or not truth:
        return float(answer == truth)
    common = sum((Counter(answer) & Counter(truth)).values())
    return 2 * common / (len(answer) + len(truth))


def answer_questions(writer: Writer, questions: Sequence[OpenQuestion], context: Context) -> Findings:
    """Have every question answered.

    Returns:
        exact_match, f1 and question_answering_count; in `details` question_answering: the first questions with their answers.

    Raises:
        UnusableData: There are no questions.
    """
    if not questions:
        raise UnusableData("there are no questions to answer", key="question_answering")
    answers = []
    for question in questions:
        answers.append(writer.answer(question.prompt, until=("\n",)).text.strip())
        context.progress(len(answers), len(questions), "answers")
    pairs = list(zip(answers, questions, strict=True))
    ones = (1.0,) * len(pairs)
    items = {
        "exact_match": Items(tuple(exact_match(a, q.answers) for a, q in pairs), ones),
        "f1": Items(tuple(f1(a, q.answers) for a, q in pairs), ones),
    }
    shown: list[dict[str, Any]] = [
        {"question": q.question, "answer": a, "truth": q.answers[0], "f1": score}
        for (a, q), score in zip(pairs[:SHOWN], items["f1"].sums, strict=False)
    ]
    return Findings(means(items) | {"question_answering_count": float(len(pairs))}, items, {"question_answering": shown})


def _question(place: str, record: dict[str, Any]) -> OpenQuestion:
    answers = record.get("answers")
    texts = answers.get("text") if isinstance(answers, dict) else answers
    context = record.get("context") or ""
    if not isinstance(record.get("question"), str) or not isinstance(context, str):
        raise UnusableData(
            f"{place}: a question needs question and answers, and may have a context; found: {', '.join(record)}", key="question_answering"
        )
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        raise UnusableData(
            f"{place}: answers must be a list of texts that are not empty, or {{text: [...]}} as in SQuAD", key="question_answering"
        )
    return OpenQuestion(context, record["question"], tuple(texts))


def _embedded() -> Iterator[OpenQuestion]:
    """Yield questions about one fact of a passage of the embedded world, from its test split."""
    rng = random.Random(f"world-{world.VERSION}-answers-test")
    while True:
        for draw in (world.Scene.draw, world.Scene.draw_homes):
            scene = draw(rng, "test")
            question, answer = rng.choice(scene.single)
            yield OpenQuestion(scene.passage, question, (answer,))
