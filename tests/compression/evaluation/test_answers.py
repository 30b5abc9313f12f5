"""Question answering and summarization. Judges: the SQuAD metrics that lm-evaluation-harness ships with LongBench, and rouge-score called by hand."""

import json
import random
from itertools import islice
from pathlib import Path

import pytest
from lm_eval.tasks.mlqa import utils as judge

from compression.context import Context
from compression.errors import UnusableData
from compression.evaluation.answers import OpenQuestion, answer_questions, exact_match, f1, normalize, open_questions
from compression.evaluation.summaries import articles, summarize
from compression.evaluation.writing import Writer
from compression.reference import world
from tests.compression.evaluation.scripted import Bytes, Scripted

WORDS = ["the", "The", "a", "An", "red", "Red!", "kettle", "kettle's", "(mill)", "42", "é", "日本", "-", "the-barn", "  "]


def lines(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_normalisation_is_squads() -> None:
    assert normalize("The  red, RED kettle's (a) lid!") == "red red kettles lid"


def test_scores_are_those_of_squads_metric() -> None:
    rng = random.Random(0)
    for _ in range(300):
        answer, *truths = (" ".join(rng.choices(WORDS, k=rng.randint(1, 6))) for _ in range(3))
        assert exact_match(answer, truths) == max(float(judge.exact_match_score(answer, t, "en")) for t in truths)
        expected = max(judge.f1_score(answer, t, "en") for t in truths)  # 0 where nothing is left of both, which SQuAD 2 calls equal
        assert f1(answer, truths) == pytest.approx(max(expected, exact_match(answer, truths)))


@pytest.mark.parametrize(
    ("answer", "truth", "exact", "score"),
    [("the mill", "Mill.", 1, 1), ("in the mill", "mill", 0, 2 / 3), ("", "mill", 0, 0), ("red red", "red", 0, 2 / 3), ("", "the", 1, 1)],
)
def test_scores_by_hand(answer: str, truth: str, exact: float, score: float) -> None:
    assert exact_match(answer, [truth]) == exact
    assert f1(answer, [truth]) == pytest.approx(score)


def test_questions_are_asked_and_answers_end_with_their_line(tmp_path: Path) -> None:
    source = lines(
        tmp_path / "q.jsonl",
        {
            "context": "The lamp is in the mill.",
            "question": "Where?",
            "answers": {"text": ["mill", "the old mill"], "answer_start": [0, 0]},
        },
        {"question": "Who owns the kettle?", "answers": ["Dalo"]},
    )
    runtime = Scripted(lambda prompt: " In the mill.\nQuestion: and?" if "Where" in prompt else " Pemir")
    found = answer_questions(Writer(runtime, Bytes(), 40), list(open_questions(source)), Context())
    assert runtime.prompts == ["The lamp is in the mill.\nQuestion: Where?\nAnswer:", "Question: Who owns the kettle?\nAnswer:"]
    assert found.metrics == {"exact_match": 0, "f1": pytest.approx((2 / 3) / 2), "question_answering_count": 2}
    assert found.details["question_answering"][0] == {
        "question": "Where?",
        "answer": "In the mill.",
        "truth": "mill",
        "f1": pytest.approx(2 / 3),
    }
    assert len(list(open_questions(source, limit=1))) == 1


def test_embedded_questions_are_answered_by_their_passage() -> None:
    asked = list(open_questions("embedded"))
    assert len(asked) == 60
    assert asked == list(open_questions("embedded"))
    train = set(world.names("train"))
    for question in asked:
        (answer,) = question.answers
        assert set(answer.rstrip(".").split()) & set(question.context.replace(".", "").split())
        assert not train & set(question.context.replace(".", "").split())
    assert len(list(islice(open_questions("embedded", limit=7), 9))) == 7


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answers": ["x"]}, r"q\.jsonl:2: a question needs"),
        ({"question": "x", "answers": []}, r"q\.jsonl:2: answers must be a list"),
        ({"question": "x", "answers": {"text": [" "]}}, r"q\.jsonl:2: answers must be a list"),
        (["no"], r"q\.jsonl:2: a line must be a JSON object"),
    ],
)
def test_lines_of_another_shape_are_refused_with_their_place(row: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(UnusableData, match=message):
        list(open_questions(lines(tmp_path / "q.jsonl", {"question": "x", "answers": ["y"]}, row)))


def test_files_that_are_missing_or_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnusableData, match="there is no file"):
        open_questions(str(tmp_path / "none.jsonl"))
    (tmp_path / "q.txt").touch()
    with pytest.raises(UnusableData, match=r"must be a \.jsonl file"):
        articles(str(tmp_path / "q.txt"))
    with pytest.raises(UnusableData, match="no questions"):
        answer_questions(Writer(Scripted(lambda _: ""), Bytes(), 4), [], Context())


def test_summaries_are_scored_by_their_longest_common_subsequence(tmp_path: Path) -> None:
    source = lines(
        tmp_path / "s.jsonl",
        {"document": "Long one.", "summary": "the cats sat on the mat"},
        {"document": "Long two.", "summary": "no word in common"},
    )
    runtime = Scripted(lambda prompt: " the cat lay on a mat\n\nAnd so on" if "one" in prompt else " kettle")
    found = summarize(Writer(runtime, Bytes(), 60), list(articles(source)), Context())
    assert runtime.prompts[0] == "Long one.\nSummary:"
    # in common, in order and stemmed: the cat on mat = 4 of 6 words on both sides
    assert found.items["rouge_l"].sums == (pytest.approx(4 / 6), 0)
    assert found.metrics == {"rouge_l": pytest.approx(2 / 6), "summarization_count": 2}
    assert found.details["summarization"][0]["summary"] == "the cat lay on a mat"
    with pytest.raises(UnusableData, match=r"s\.jsonl:1: a line needs document and summary"):
        list(articles(lines(tmp_path / "s.jsonl", {"document": "x", "summary": ""})))
    with pytest.raises(UnusableData, match="no documents"):
        summarize(Writer(runtime, Bytes(), 4), [], Context())


def test_a_question_without_a_context_begins_with_the_question() -> None:
    assert OpenQuestion("", "Why?", ("x",)).prompt == "Question: Why?\nAnswer:"
