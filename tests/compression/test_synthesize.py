"""A model writes its own corpus: what is drawn, judged by float64 and by brute force, and what is kept of it."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from compression.checkpoints.checkpoint import file_digests
from compression.checkpoints.loading import load_model, load_tokenizer
from compression.context import Context
from compression.data.rows import prompts_of, start_token
from compression.errors import EdgepressError
from compression.synthesis.settings import SynthesisSettings
from compression.synthesis.synthesize import _seed, nucleus, sample, synthesize
from tests.tiny import SENTENCES, tiny_checkpoint, tiny_tokenizer, tiny_windows

EOS = 1


def exact(logits: np.ndarray, temperature: float, top_p: float) -> tuple[np.ndarray, np.ndarray]:
    """In float64: the nucleus of one position by its definition, and the masses of all prefixes of the sorted tokens."""
    scaled = logits.astype(np.float64) / temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    masses = np.cumsum(p[order])
    size = next((n for n, mass in enumerate(masses, 1) if mass >= top_p), len(p))
    kept = np.zeros_like(p)
    kept[order[:size]] = p[order[:size]]
    return kept / kept.sum(), masses


@settings(deadline=None)
@given(
    st.lists(st.integers(-64, 64), min_size=1, max_size=40), st.sampled_from([0.3, 0.7, 1.0, 2.0]), st.sampled_from([1e-6, 0.2, 0.5, 0.9, 1.0])
)  # fmt: skip
def test_the_nucleus_is_the_smallest_set_with_its_mass(eighths: list[int], temperature: float, top_p: float) -> None:
    logits = [number / 8 for number in eighths]
    expected, masses = exact(np.array(logits), temperature, top_p)
    assume(np.abs(masses - top_p).min() > 1e-5 or top_p == 1)  # float32 may see such a boundary on either side
    found = nucleus(torch.tensor(logits), temperature=temperature, top_p=top_p)
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-6)
    assert (found > 0).sum() >= 1


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 0.8), (1.5, 0.5)])
def test_tokens_are_drawn_with_the_probabilities_of_the_model(checkpoint: Path, temperature: float, top_p: float) -> None:
    """The first token behind a prompt, and the second behind each first one, which a cache answers."""
    prompt, draws = tiny_windows(1, 5), 6000
    drawn = sample(
        load_model(checkpoint), prompt.expand(draws, -1), length=7, temperature=temperature, top_p=top_p, ends=[EOS], vocabulary=320, seed=3
    )  # fmt: skip
    judge = load_model(checkpoint, dtype=torch.float64)

    def fits(tokens: list[int], before: torch.Tensor) -> bool:
        with torch.no_grad():
            p, _ = exact(judge(input_ids=before).logits[0, -1].numpy(), temperature, top_p)
        counts = np.bincount(tokens, minlength=320)
        assert counts[p == 0].sum() == 0
        often = p * len(tokens) >= 5  # the others are one group
        observed, expected = (np.array([*v[often], v[~often].sum()]) for v in (counts, p * len(tokens)))
        return chisquare(observed[expected > 0], expected[expected > 0]).pvalue > 1e-4

    assert fits([row[0] for row in drawn], prompt)
    firsts = Counter(row[0] for row in drawn if len(row) == 2)
    for first, count in firsts.most_common(2):
        assert count > 50
        assert fits([row[1] for row in drawn if row[0] == first], torch.cat([prompt, torch.tensor([[first]])], 1))


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_a_tiny_top_p_is_greedy_and_ended_rows_disturb_no_other(tmp_path: Path, model_type: str) -> None:
    """Against the argmax of the whole sequence, without a cache, row by row."""
    model = load_model(tiny_checkpoint(tmp_path / "model", model_type))
    prompts, length = tiny_windows(6, 4), 24
    free = _greedy(model, prompts, length, [])
    ends = sorted({free[0][3], free[1][9]})  # so that rows end here and there
    expected = _greedy(model, prompts, length, ends)
    assert len({len(row) for row in expected}) > 1
    assert sample(model, prompts, length=length, temperature=1.0, top_p=1e-6, ends=ends, vocabulary=320, seed=0) == expected


def _greedy(model: Any, prompts: torch.Tensor, length: int, ends: list[int]) -> list[list[int]]:
    rows = []
    for prompt in prompts.tolist():
        row = list(prompt)
        while len(row) < length and not (len(row) > len(prompt) and row[-1] in ends):
            with torch.no_grad():
                row.append(int(model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1].argmax()))
        rows.append(row[len(prompt) :])
    return rows


def test_no_token_beyond_the_vocabulary_is_drawn(checkpoint: Path) -> None:
    drawn = sample(load_model(checkpoint), tiny_windows(64, 4), length=12, temperature=5.0, top_p=1.0, ends=[], vocabulary=50, seed=0)
    assert {len(row) for row in drawn} == {8} and max(token for row in drawn for token in row) == 49


def write(
    checkpoint: Path, home: Path, *, seed: int = 0, prompts: Any = None, context: Context | None = None, **asked: Any
) -> dict[str, float]:
    return synthesize(
        checkpoint, home / "out", settings=SynthesisSettings(**({"length": 32, "min_tokens": 4, "batch_size": 4} | asked)), prompts=prompts,
        workdir=home / "work", context=context or Context(seed=seed), save_seconds=0,
    )  # fmt: skip


def texts(home: Path) -> list[str]:
    return [json.loads(line)["text"] for line in (home / "out" / "corpus.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_same_seed_writes_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    for name, seed in (("one", 5), ("again", 5), ("other", 6)):
        assert write(checkpoint, tmp_path / name, seed=seed, documents=10)["documents"] == 10
    digests = {name: file_digests(tmp_path / name / "out") for name in ("one", "again", "other")}
    assert digests["one"] == digests["again"] and digests["one"]["corpus.jsonl"] != digests["other"]["corpus.jsonl"]


def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    write(checkpoint, tmp_path / "whole", documents=20)
    seen: list[int] = []

    def dies(done: int, total: int, what: str) -> None:
        seen.append(done)
        if len(seen) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(checkpoint, tmp_path / "killed", documents=20, context=Context(progress=dies))
    assert seen[-1] > 0 and not (tmp_path / "killed" / "out").exists()
    after: list[int] = []
    context = Context(progress=lambda done, *_: after.append(done))
    write(checkpoint, tmp_path / "killed", documents=20, context=context)
    assert after[0] == seen[-1]
    assert file_digests(tmp_path / "killed" / "out") == file_digests(tmp_path / "whole" / "out")
    with pytest.raises(EdgepressError, match="other settings"):
        write(checkpoint, tmp_path / "killed", documents=20, temperature=0.5)
    with pytest.raises(EdgepressError, match="another model"):
        write(tiny_checkpoint(tmp_path / "other", seed=1), tmp_path / "killed", documents=20)


@pytest.mark.parametrize("unit", ["documents", "tokens"])
def test_what_is_kept_and_what_is_counted(checkpoint: Path, tmp_path: Path, unit: str) -> None:
    """Against a count over the same draws, decoded by hand. Many tokens end a document of this model, so some are short, and some alike."""
    model, network, ends = tmp_path / "model", load_model(checkpoint), list(range(EOS, 80))
    network.resize_token_embeddings(400)  # padded: what lies beyond the tokenizer is never drawn
    network.generation_config.eos_token_id = ends
    network.save_pretrained(model)
    load_tokenizer(checkpoint).save_pretrained(model)
    wanted = {"documents": 12, "tokens": 100}[unit]
    asked = {"temperature": 0.5, "top_p": 0.35, "min_tokens": 3, "length": 16, unit: wanted}
    (prompt,) = prompts_of(SENTENCES[:1], load_tokenizer(model), 2)
    metrics = write(model, tmp_path, seed=4, prompts=[prompt], **asked)

    tokenizer, kept, counts = load_tokenizer(model), [], Counter(dict.fromkeys(("duplicates", "too_short", "cut"), 0))
    for batch in range(50):
        drawn = sample(
            network, torch.tensor([[0, *prompt]] * 4), length=16, temperature=0.5, top_p=0.35, ends=ends, vocabulary=len(tokenizer),
            seed=_seed(4, batch),
        )  # fmt: skip
        for row in drawn:
            if (counts[unit] if unit == "tokens" else len(kept)) >= wanted:
                break
            counts["sampled"] += 1
            body = [token for token in row if token not in ends]
            text = tokenizer.decode([token for token in [*prompt, *body] if token > EOS])
            text = text if row[-1] in ends else text.rstrip("\ufffd")
            if len(body) < 3:
                counts["too_short"] += 1
            elif text in kept:
                counts["duplicates"] += 1
            else:
                kept.append(text)
                counts["tokens"] += len(prompt) + len(body)
                counts["cut"] += row[-1] not in ends
    assert texts(tmp_path) == kept
    assert metrics == {"documents": len(kept), **counts}
    assert (counts["duplicates"] or unit == "tokens") and counts["too_short"]
    assert counts["sampled"] == len(kept) + counts["duplicates"] + counts["too_short"]
    written = json.loads((tmp_path / "out" / "corpus.json").read_text())
    assert {name: written[name] for name in metrics} == metrics


def test_a_model_that_repeats_itself_is_told(checkpoint: Path, tmp_path: Path) -> None:
    warnings: list[str] = []
    prompts = [[5], [6], [7]]
    metrics = write(checkpoint, tmp_path, prompts=prompts, documents=50, top_p=1e-6, context=Context(warn=warnings.append))
    assert metrics["documents"] == 3 and metrics["duplicates"] == 37 and metrics["sampled"] == 40
    assert len(warnings) == 1 and "3 documents of 50" in warnings[0]


def test_nothing_worth_keeping_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    prompt = tiny_windows(1, 1)
    first = _greedy(load_model(checkpoint), torch.cat([torch.zeros(1, 1, dtype=torch.long), prompt], 1), 3, [])[0][0]
    model = tmp_path / "model"
    network, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    network.generation_config.eos_token_id = [EOS, first]  # one of several ends, in the settings only
    network.save_pretrained(model)
    tokenizer.save_pretrained(model)
    with pytest.raises(EdgepressError, match="nothing worth keeping in 40 documents") as caught:
        write(model, tmp_path, prompts=prompt.tolist(), documents=1, top_p=1e-6)
    assert caught.value.key == "model"


def test_documents_begin_as_training_rows_do() -> None:
    assert start_token(tiny_tokenizer(bos=True)) == 0
    assert start_token(tiny_tokenizer(bos=False)) == EOS
    bare = tiny_tokenizer(bos=False)
    bare.eos_token = None
    assert start_token(bare) == 0
    bare.bos_token = None
    with pytest.raises(EdgepressError, match="neither BOS nor EOS"):
        start_token(bare)


def test_prompts_are_the_first_tokens_of_texts_that_have_as_many() -> None:
    tokenizer = tiny_tokenizer()
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in SENTENCES]
    count = sorted(map(len, encoded))[3]
    assert prompts_of(SENTENCES, tokenizer, count) == [tokens[:count] for tokens in encoded if len(tokens) >= count]
    with pytest.raises(EdgepressError, match="1000 tokens") as caught:
        prompts_of(SENTENCES, tokenizer, 1000)
    assert caught.value.key == "prompt_tokens"


def test_documents_begin_with_their_prompts(checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(checkpoint)
    prompts = prompts_of([text for text in SENTENCES if text.isascii()], tokenizer, 5)
    write(checkpoint, tmp_path, prompts=prompts, documents=12)
    beginnings = {tokenizer.decode(prompt) for prompt in prompts}
    assert {next(b for b in beginnings if text.startswith(b)) for text in texts(tmp_path)} == beginnings


@pytest.mark.parametrize(
    ("asked", "key"),
    [
        ({}, "documents"), ({"documents": 1, "tokens": 1}, "documents"), ({"documents": 0}, "documents"), ({"tokens": 0}, "tokens"),
        ({"documents": 1, "temperature": 0.0}, "temperature"), ({"documents": 1, "top_p": 0.0}, "top_p"), ({"documents": 1, "top_p": 1.1}, "top_p"),
        ({"documents": 1, "min_tokens": 32}, "min_tokens"), ({"documents": 1, "batch_size": 0}, "batch_size"),
        ({"documents": 1, "prompts": [[1], [1, 2]]}, "prompt_tokens"), ({"documents": 1, "prompts": [list(range(28))]}, "prompt_tokens"),
        ({"documents": 1, "prompts": []}, "prompt_tokens"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked(checkpoint: Path, tmp_path: Path, asked: dict[str, Any], key: str) -> None:
    with pytest.raises(EdgepressError) as caught:
        write(checkpoint, tmp_path, **asked)
    assert caught.value.key == key
