import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compression.checkpoints.loading import load_model
from compression.context import Context
from compression.data import encode_choices
from compression.errors import Incompatible, UnusableData, UnusableModel
from compression.evaluation.scorers import MultipleChoice, divergence, evaluate_quality, log_likelihoods, multiple_choice, perplexity
from compression.evaluation.transformers_runtime import TransformersRuntime
from compression.reference.world import Question
from tests.tiny import tiny_checkpoint, tiny_tokenizer, tiny_windows

QUESTIONS = [
    Question("The lamp is in the mill.", "Where is the lamp?", ("in the mill", "in the barn", "at noon", "a", "Ünïcödé 日本語"), 0),
    Question("", "Who owns the bell?", ("Dalo", "Pemir", "kettle", "red", "red kettle"), 4),
    Question(
        "At noon Pemir went to the tower. " * 3, "What for?", ("to look for the bell", "to look", "to look for tabs", "to", "bell"), 2
    ),
    Question("Dalo owns the lamp and the red kettle.", "Who?", ("Dalo", "Dalo and Pemir", "Pemir", "the kettle", "nobody"), 0),
]


class Fake:
    """A runtime that computes its logits with a given function of the tokens and counts what it was asked."""

    name, version, timed = "fake", "1", True

    def __init__(self, compute: Callable[[np.ndarray], np.ndarray], max_length: int = 1024):
        self.compute, self.max_length, self.rows = compute, max_length, 0

    def logits(self, input_ids: np.ndarray) -> np.ndarray:
        self.rows += len(input_ids)
        return self.compute(input_ids)

    def start(self, prompt: list[int], new_tokens: int) -> np.ndarray:
        raise NotImplementedError

    def step(self, token: int) -> np.ndarray:
        raise NotImplementedError

    def close(self) -> None: ...


def random_model(seed: int, max_length: int = 1024, vocabulary: int = 320) -> Fake:
    """Logits that depend on the last two tokens."""
    table = np.random.default_rng(seed).normal(size=(2, vocabulary, vocabulary)).astype(np.float32)
    return Fake(lambda ids: table[0, ids] + table[1, np.concatenate([ids[:, :1], ids[:, :-1]], 1)], max_length)


@pytest.fixture(scope="module")
def runtime(checkpoint: Path) -> TransformersRuntime:
    return TransformersRuntime(checkpoint, threads=1)


def test_perplexity_is_transformers_own_loss(runtime: TransformersRuntime, checkpoint: Path) -> None:
    windows = tiny_windows(37, 24)
    loss = load_model(checkpoint)(input_ids=windows, labels=windows).loss
    assert perplexity(runtime, windows, Context()) == pytest.approx(math.exp(loss.item()), rel=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1e-6, 1e-2, 1.0]))
def test_divergence_is_the_float64_formula(seed: int, distance: float) -> None:
    draw = np.random.default_rng(seed)
    reference = draw.normal(scale=4, size=(3, 5, 50)).astype(np.float32)
    candidate = (reference + draw.normal(scale=distance, size=reference.shape)).astype(np.float32)
    p, q = (np.exp(x.astype(np.float64)) for x in (reference, candidate))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    kl = (p * np.log(p / q)).sum(-1).ravel()
    figures = divergence(reference, candidate).figures("base")
    assert figures["kl_to_base"] == pytest.approx(kl.mean(), rel=1e-6, abs=1e-15)
    assert figures["kl_p99_to_base"] == pytest.approx(np.percentile(kl, 99), rel=1e-6, abs=1e-15)
    assert figures["top1_agreement_to_base"] == (reference.argmax(-1) == candidate.argmax(-1)).mean()
    assert figures["max_logit_difference_to_base"] == np.abs(reference.astype(np.float64) - candidate).max()


def test_large_vocabularies_are_taken_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, candidate = np.random.default_rng(0).normal(size=(2, 4, 9, 70)).astype(np.float32)
    tokens = np.random.default_rng(1).integers(0, 70, (4, 9))
    whole, likely = divergence(reference, candidate), log_likelihoods(reference, tokens)
    monkeypatch.setattr("compression.evaluation.likelihood._CHUNK_LOGITS", 200)
    np.testing.assert_allclose(divergence(reference, candidate).kl, whole.kl, rtol=1e-12)
    np.testing.assert_allclose(log_likelihoods(reference, tokens), likely, rtol=1e-12)


def judge(runtime: Fake | TransformersRuntime, question: Question) -> list[float]:
    """lm-evaluation-harness' acc_bytes, one choice at a time and nothing shared: the likelihood of each choice per byte."""
    scores = []
    for (prompt, answer), text in zip(encode_choices(tiny_tokenizer(), question), question.choices, strict=True):
        tokens = (prompt + answer)[-(runtime.max_length + 1) :]
        logits = runtime.logits(np.array([tokens[:-1]]))[0].astype(np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        scores.append(sum(log_p[-len(answer) + i, t] for i, t in enumerate(answer)) / len(text.encode()))
    return scores


@pytest.mark.parametrize("max_length", [1024, 40])
@pytest.mark.parametrize("seed", [0, 1])
def test_multiple_choice_agrees_with_one_choice_at_a_time(seed: int, max_length: int) -> None:
    model = random_model(seed, max_length)
    correct = multiple_choice(model, tiny_tokenizer(), QUESTIONS, Context()).correct
    assert correct == tuple(int(np.argmax(judge(model, q))) == q.answer for q in QUESTIONS)


def test_multiple_choice_agrees_on_a_model_with_attention(runtime: TransformersRuntime) -> None:
    questions = [Question("", q.question, q.choices, q.answer) for q in QUESTIONS]
    winners = [int(np.argmax(judge(runtime, q))) for q in questions]
    solved = [Question(q.passage, q.question, q.choices, w) for q, w in zip(questions, winners, strict=True)]
    assert all(multiple_choice(runtime, tiny_tokenizer(), solved, Context()).correct)
    lost = [Question(q.passage, q.question, q.choices, (w + 1) % 5) for q, w in zip(questions, winners, strict=True)]
    assert not any(multiple_choice(runtime, tiny_tokenizer(), lost, Context()).correct)


def test_choices_of_one_token_share_one_row() -> None:
    model = random_model(0)
    multiple_choice(model, tiny_tokenizer(), [Question("", "?", ("is", "the", "to"), 0)], Context())
    tokens = [len(answer) for _, answer in encode_choices(tiny_tokenizer(), Question("", "?", ("is", "the", "to"), 0))]
    assert tokens == [1, 1, 1]
    assert model.rows == 1


def test_batches_are_sized_by_the_models_own_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    padded = random_model(0, vocabulary=1000)
    asked: list[tuple[int, int]] = []
    compute = padded.compute
    monkeypatch.setattr(padded, "compute", lambda ids: asked.append(ids.shape) or compute(ids))
    monkeypatch.setattr("compression.evaluation.likelihood._BATCH_LOGITS", 4 * 1000 * 80)
    multiple_choice(padded, tiny_tokenizer(), QUESTIONS, Context())
    assert len(asked) > 1 and max(rows for rows, _ in asked) > 1
    assert all(rows == 1 or rows * length * 1000 <= 4 * 1000 * 80 for rows, length in asked)


def test_perplexity_of_a_loss_beyond_floats_is_infinite() -> None:
    windows = tiny_windows(3)
    hopeless = Fake(lambda ids: np.where(np.arange(320) == 0, 1e4, 0.0).astype(np.float32) * np.ones((*ids.shape, 1), np.float32))
    assert perplexity(hopeless, windows, Context()) == math.inf
    assert evaluate_quality(hopeless, tiny_tokenizer(), windows, [], references={}, context=Context()).metrics["perplexity"] == math.inf


def test_accuracy_has_a_standard_error_and_a_count() -> None:
    correct = (True, True, False, True, False, False, True)
    figures = MultipleChoice(correct).figures()
    assert figures["accuracy"] == np.mean(correct)
    assert figures["accuracy_stderr"] == pytest.approx(np.std(correct, ddof=1) / math.sqrt(7))
    assert figures["accuracy_count"] == 7
    assert "accuracy_stderr" not in MultipleChoice((True,)).figures()


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(UnusableData, match="no questions"):
        multiple_choice(random_model(0), tiny_tokenizer(), [], Context())
    with pytest.raises(UnusableData, match="does not fit"):
        multiple_choice(random_model(0, max_length=3), tiny_tokenizer(), QUESTIONS[:1], Context())
    with pytest.raises(Incompatible, match="windows of 32 tokens"):
        perplexity(random_model(0, max_length=31), tiny_windows(1, 32), Context())
    with pytest.raises(UnusableModel, match="not finite"):
        perplexity(Fake(lambda ids: np.full((*ids.shape, 320), np.nan, np.float32)), tiny_windows(1), Context())
    with pytest.raises(Incompatible, match="same vocabulary"):
        divergence(np.zeros((2, 3), np.float32), np.zeros((2, 4), np.float32))


def test_evaluate_quality_tells_all_figures_in_one_pass(runtime: TransformersRuntime, tmp_path: Path) -> None:
    other = TransformersRuntime(tiny_checkpoint(tmp_path, seed=1), threads=1)
    windows, tokenizer, short = tiny_windows(20, 32), tiny_tokenizer(), QUESTIONS[:2]
    figures = evaluate_quality(other, tokenizer, windows, short, references={"base": runtime, "parent": other}, context=Context()).metrics
    reference, candidate = (r.logits(windows.numpy())[:, :-1] for r in (runtime, other))
    expected = divergence(reference, candidate).figures("base")
    assert {k: figures[k] for k in expected} == pytest.approx(expected, rel=1e-4)
    assert figures["top1_agreement"] == figures["top1_agreement_to_base"] < 1
    assert (figures["kl_to_parent"], figures["top1_agreement_to_parent"]) == (0, 1)
    assert figures["perplexity"] == perplexity(other, windows, Context())
    assert figures["perplexity_count"] == 20 * 31
    assert figures["accuracy_count"] == 2
    assert all(type(v) is float for v in figures.values())
    assert "accuracy" not in evaluate_quality(other, tokenizer, windows[:1], [], references={}, context=Context()).metrics


def test_a_reference_with_two_names_runs_once() -> None:
    base, model = random_model(0), random_model(1)
    evaluate_quality(model, tiny_tokenizer(), tiny_windows(5), [], references={"base": base, "parent": base}, context=Context())
    assert (base.rows, model.rows) == (5, 5)


def test_progress_reaches_its_total() -> None:
    seen: list[tuple[int, int, str]] = []
    context = Context(progress=lambda *step: seen.append(step))
    evaluate_quality(random_model(0), tiny_tokenizer(), tiny_windows(40), QUESTIONS, references={}, context=context)
    for what in ("windows", "questions"):
        steps = [(done, total) for done, total, name in seen if name == what]
        assert steps == sorted(steps)
        assert steps[-1][0] == steps[-1][1]
