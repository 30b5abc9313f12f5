"""Summarization: ROUGE-L of what a model writes after a document. Imports no torch.

A line of a .jsonl file is {"document": ..., "summary": ...}. The prompt is "{document}\\nSummary:" (compression/evaluation/writing.py), and a summary is
one paragraph. ROUGE-L is the F1 of the longest common subsequence of words, stemmed, as the package rouge-score computes it
(Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from compression.context import Context
from compression.data.sources import file_records
from compression.errors import UnusableData
from compression.evaluation.answers import SHOWN, existing_jsonl
from compression.evaluation.findings import Findings, Items
from compression.evaluation.sanity import means
from compression.evaluation.writing import Writer


@dataclass(frozen=True)
class Article:
    """A document and the summary a person wrote of it."""

    document: str
    summary: str

    @property
    def prompt(self) -> str:
        return f"{self.document}\nSummary:"


def articles(source: str, limit: int | None = None) -> Iterator[Article]:
    """Yield the documents of a .jsonl file, `limit` at most.

    Raises:
        UnusableData: With file and line: no such file, no JSON, another shape.
    """
    return islice((_article(place, record) for place, record in file_records(existing_jsonl(source, "summarization"), None)), limit)


def summarize(writer: Writer, documents: Sequence[Article], context: Context) -> Findings:
    """Have every document summarized.

    Returns:
        rouge_l (0 to 1) and summarization_count; in `details` summarization: the first summaries, each with the true one.

    Raises:
        UnusableData: There are no documents.
    """
    from rouge_score.rouge_scorer import RougeScorer

    if not documents:
        raise UnusableData("there are no documents to summarize", key="summarization")
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    texts, scores = [], []
    for article in documents:
        texts.append(writer.answer(article.prompt, until=("\n\n",)).text.strip())
        scores.append(scorer.score(article.summary, texts[-1])["rougeL"].fmeasure)
        context.progress(len(texts), len(documents), "summaries")
    items = {"rouge_l": Items(tuple(scores), (1.0,) * len(scores))}
    shown = [
        {"summary": text, "truth": article.summary, "rouge_l": score}
        for article, text, score in list(zip(documents, texts, scores, strict=True))[:SHOWN]
    ]
    return Findings(means(items) | {"summarization_count": float(len(texts))}, items, {"summarization": shown})


def _article(place: str, record: dict[str, Any]) -> Article:
    document, summary = record.get("document"), record.get("summary")
    if not isinstance(document, str) or not isinstance(summary, str) or not document.strip() or not summary.strip():
        raise UnusableData(f"{place}: a line needs document and summary, both texts; found: {', '.join(record)}", key="summarization")
    return Article(document, summary)
