"""Tokenizers of every kind, proven in llama.cpp; wrong ones are caught."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from compression.context import Context
from compression.errors import EdgepressError, Incompatible
from export.gguf import native
from export.gguf.pretokenizer import LLAMA3, QWEN2, QWEN35, Definition, recognize
from export.gguf.tokenizer import merge_scores, read_vocabulary
from export.gguf.torture import TEXTS
from export.gguf.writer import export_gguf
from tests.tiny import SENTENCES, tiny_tokenizer

CORPUS = [*SENTENCES, *TEXTS, "I'LL WE'VE don't 1234 12 98765 3.14   spaces    more\n\n\n lines"] * 2
EVERY_BYTE = [f"<0x{i:02X}>" for i in range(256)]


def byte_level(splitter: pre_tokenizers.PreTokenizer | None, *, ignore_merges: bool = False, nfc: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not isinstance(splitter, pre_tokenizers.Split))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([splitter, last]) if splitter else last
    tokenizer.decoder = decoders.ByteLevel()
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return train(
        tokenizer, trainers.BpeTrainer(vocab_size=600, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    )


def split(regex: str) -> pre_tokenizers.Split:
    return pre_tokenizers.Split(Regex(regex), behavior="isolated")


def sentencepiece(*, scheme: str | None = None) -> Tokenizer:
    """Llama-2's kind: with its own normalizer, or with Metaspace as transformers 5 rebuilds it; or Gemma's, without a space in front."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    if scheme is None:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif scheme == "gemma":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    words = Tokenizer(models.BPE(unk_token="<unk>"))  # merges are learned inside words, as SentencePiece does
    words.normalizer, words.pre_tokenizer = (
        normalizers.Replace(" ", "▁"),
        pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always"),
    )
    train(
        words,
        trainers.BpeTrainer(vocab_size=900, special_tokens=["<unk>", "<s>", "</s>", *EVERY_BYTE], limit_alphabet=80, show_progress=False),
    )
    learned = json.loads(words.to_str())["model"]
    tokenizer.model = models.BPE(
        vocab=learned["vocab"], merges=[tuple(m) for m in learned["merges"]], byte_fallback=True, fuse_unk=True, unk_token="<unk>"
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def train(tokenizer: Tokenizer, trainer: trainers.BpeTrainer) -> Tokenizer:
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def export_with(tokenizer: Tokenizer, tmp_path: Path, context: Context | None = None, **settings: object) -> dict[str, Any]:
    """Export a model that has this tokenizer and return the file's tokenizer.ggml.* fields."""
    source, out = tmp_path / "model", tmp_path / "out"
    config = AutoConfig.for_model(
        "llama", vocab_size=1024, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, eos_token_id=1
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(source)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **settings).save_pretrained(source)
    export_gguf(source, out, type="f16", context=context or Context())
    fields = gguf.GGUFReader(out / "model.gguf").fields
    return {name.removeprefix("tokenizer."): field.contents() for name, field in fields.items() if name.startswith("tokenizer.")}


BYTE_LEVEL = {
    "gpt-2": lambda: byte_level(None),
    "smollm": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True)),
    "llama-bpe": lambda: byte_level(split(LLAMA3), ignore_merges=True),
    "dbrx": lambda: byte_level(split(LLAMA3)),
    "qwen2": lambda: byte_level(split(QWEN2), nfc=True),
    "qwen35": lambda: byte_level(split(QWEN35), nfc=True),
}


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_byte_level_by_its_definition(tmp_path: Path, name: str) -> None:
    warnings: list[str] = []
    fields = export_with(BYTE_LEVEL[name](), tmp_path, Context(warn=warnings.append))
    assert (fields["ggml.model"], fields["ggml.pre"]) == ("gpt2", name)
    assert fields["ggml.add_bos_token"] is False and fields["ggml.bos_token_id"] == 0 and fields["ggml.eos_token_id"] == 1
    assert fields["ggml.token_type"][:3] == [3, 3, 1] and fields["ggml.token_type"][-1] == 5 and len(fields["ggml.tokens"]) == 1024
    assert ["NFC" in w for w in warnings] == [True] * ("qwen" in name)


@pytest.mark.parametrize("scheme", [None, "always", "first", "never", "gemma"])
def test_sentencepiece_by_merge_ranks(tmp_path: Path, scheme: str | None) -> None:
    warnings: list[str] = []
    fields = export_with(sentencepiece(scheme=scheme), tmp_path, Context(warn=warnings.append), unk_token="<unk>")
    assert fields["ggml.model"] == "llama" and fields["ggml.add_space_prefix"] is (scheme not in ("never", "gemma"))
    assert fields["ggml.token_type"][:4] == [2, 3, 3, 6]
    assert bool(warnings) is (scheme in ("always", "first"))


def test_begin_and_end_of_text_and_chat_template(tmp_path: Path) -> None:
    tokenizer = byte_level(None)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    fields = export_with(tokenizer, tmp_path, chat_template="{{ messages[0].content }}")
    assert fields["ggml.add_bos_token"] is True and fields["ggml.add_eos_token"] is True
    assert fields["chat_template"] == "{{ messages[0].content }}"
    assert fields["ggml.token_type"][fields["ggml.tokens"].index("<tool>")] == gguf.TokenType.USER_DEFINED


def test_a_wrong_pre_tokenizer_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.gguf.tokenizer.recognize", lambda tokenizer: Definition("gpt2", "llama-bpe"))
    with pytest.raises(Incompatible, match=r"would tokenize otherwise.*from token"):
        export_with(byte_level(pre_tokenizers.Digits(individual_digits=True)), tmp_path)
    assert list((tmp_path / "out").iterdir()) == []


def test_wrong_scores_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "export.gguf.tokenizer.merge_scores", lambda tokens, merges: [-1000.0] * len(tokens)
    )  # what the official converter writes
    with pytest.raises(Incompatible, match="would tokenize otherwise"):
        export_with(sentencepiece(), tmp_path, unk_token="<unk>")


def test_a_token_that_strips_its_surroundings_is_caught(tmp_path: Path) -> None:
    tokenizer = byte_level(None)
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, normalized=False)])
    with pytest.raises(Incompatible, match="<mask>"):
        export_with(tokenizer, tmp_path)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), unique=True, max_size=9))
def test_scores_fall_with_the_rank(pairs: list[tuple[str, str]]) -> None:
    tokens = [*"abc", *("".join(p) for p in pairs)]
    scores = dict(zip(tokens, merge_scores(tokens, pairs), strict=True))
    assert sorted(("".join(p) for p in pairs), key=lambda token: -scores[token]) == ["".join(p) for p in pairs]
    assert all(scores[single] < scores["".join(pair)] for single in "abc" for pair in pairs)


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"model": {"type": "Unigram", "vocab": []}}, "type Unigram"),
        ({"normalizer": {"type": "Lowercase"}}, "Lowercase"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "byte-level"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}}, "without a leading space"),
        (
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [{"type": "Digits", "individual_digits": False}, {"type": "ByteLevel"}],
                }
            },
            "no name known",
        ),
    ],
)
def test_unknown_definitions_are_refused(change: dict[str, object], pattern: str) -> None:
    definition = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    assert recognize(definition) == Definition("gpt2", "gpt-2")
    with pytest.raises(Incompatible, match=pattern):
        recognize(definition | change)


def test_vocabulary_must_fit_and_end() -> None:
    tokenizer = tiny_tokenizer()
    size = len(tokenizer)
    with pytest.raises(Incompatible, match=f"has the id {size - 1}, but the embedding has only {size - 1} rows"):
        read_vocabulary(tokenizer, size - 1, {})
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(Incompatible, match="end-of-text"):
        read_vocabulary(endless, size, {})
    assert read_vocabulary(endless, size, {"bos_token_id": 0, "eos_token_id": [1, 0]}).special == {"bos": 0, "eos": 1}
    with pytest.raises(Incompatible, match="nothing else"):
        read_vocabulary(endless, size, {"eos_token_id": 1})  # the post-processor adds <s>, which nothing names


def test_a_crash_of_llama_cpp_is_an_error_not_the_end(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF, not really")
    vocabulary = read_vocabulary(tiny_tokenizer(), 320, {})
    with pytest.raises(EdgepressError, match=r"(?s)failed to tokenize \(exit code 1\).*version 1869488172.*cannot open"):
        native.prove_tokenizer(tmp_path / "model.gguf", tiny_tokenizer(), vocabulary)
