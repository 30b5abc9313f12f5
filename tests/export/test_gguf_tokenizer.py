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

from compression.checkpoints.checkpoint import open_checkpoint
from compression.checkpoints.tokenizer_corpus import TEXTS
from compression.context import Context
from compression.errors import EdgepressError, Incompatible
from export.gguf import GgufSettings, check_gguf, export_gguf, native
from export.gguf.pretokenizer import LLAMA3, O200K, QWEN2, QWEN35, TEKKEN, Definition, recognize
from export.gguf.special import model_name
from export.gguf.tokenizer import TokenType, Vocabulary, merge_scores, read_vocabulary
from export.runtimes.llamacpp import LlamaCppRuntime
from export.runtimes.llamacpp_text import LlamaCppText
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


def model_with(
    tokenizer: Tokenizer, path: Path, *, ends: list[int] | None = None, rows: int = 1024, model_type: str = "llama", **settings: object
) -> Path:
    """A model that has this tokenizer. ends: what its generation_config.json says."""
    config = AutoConfig.for_model(
        model_type, vocab_size=rows, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, eos_token_id=1
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    if ends:
        model.generation_config.eos_token_id = ends
    model.save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"bos_token": "<s>", "eos_token": "</s>"} | settings).save_pretrained(path)
    return path


def export_with(tokenizer: Tokenizer, tmp_path: Path, context: Context | None = None, **settings: Any) -> dict[str, Any]:
    """Export a model that has this tokenizer and return the file's tokenizer.ggml.* fields and its name."""
    source, out = model_with(tokenizer, tmp_path / "model", **settings), tmp_path / "out"
    export_gguf(source, out, GgufSettings(type="f16"), context=context or Context())
    fields = gguf.GGUFReader(out / "model.gguf").fields
    return {
        name.removeprefix("tokenizer."): field.contents()
        for name, field in fields.items()
        if name.startswith(("tokenizer.", "general.name"))
    }


def vocabulary_of(path: Path) -> Vocabulary:
    return read_vocabulary(path, open_checkpoint(path).vocab_size)


def check(path: Path) -> None:
    check_gguf(open_checkpoint(path), GgufSettings(type="f16"))


BYTE_LEVEL = {
    "gpt-2": lambda: byte_level(None),
    "smollm": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True)),
    "llama-bpe": lambda: byte_level(split(LLAMA3), ignore_merges=True),
    "dbrx": lambda: byte_level(split(LLAMA3)),
    "qwen2": lambda: byte_level(split(QWEN2), nfc=True),
    "qwen35": lambda: byte_level(split(QWEN35), nfc=True),
    "granite-embed-multi-97m": lambda: byte_level(split(O200K)),
    "tekken": lambda: byte_level(split(TEKKEN), ignore_merges=True),
}


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_byte_level_by_its_definition(tmp_path: Path, name: str) -> None:
    warnings: list[str] = []
    fields = export_with(BYTE_LEVEL[name](), tmp_path, Context(warn=warnings.append))
    assert (fields["ggml.model"], fields["ggml.pre"]) == ("gpt2", name)
    assert fields["ggml.add_bos_token"] is False and fields["ggml.bos_token_id"] == 0 and fields["ggml.eos_token_id"] == 1
    assert fields["ggml.token_type"][:3] == [3, 3, 1] and fields["ggml.token_type"][-1] == 5 and len(fields["ggml.tokens"]) == 1024
    told = {"qwen2": ["NFC"], "qwen35": ["NFC"], "tekken": ["combining marks", "capital"], "granite-embed-multi-97m": ["capital"]}
    assert [word in warning for word, warning in zip(told.get(name, []), warnings, strict=True)] == [True] * len(warnings)


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


def phi3(*, strips: set[str] | None = None) -> Tokenizer:
    """Phi-3's kind: SentencePiece, and tokens that swallow the blanks behind them, </s> among them, <unk>, <s> and <|endoftext|> not."""
    definition = json.loads(sentencepiece().to_str())
    tokenizer = Tokenizer.from_str(json.dumps(definition | {"added_tokens": []}))
    plain, special = ["<unk>", "<s>", "<|endoftext|>"], ["</s>", "<|user|>", "<|end|>", "<|assistant|>"]
    stripped = set(special) if strips is None else strips
    tokenizer.add_special_tokens([AddedToken(token, rstrip=token in stripped, normalized=False) for token in (*plain, *special)])
    return tokenizer


def test_phi3s_tokens_swallow_blanks(tmp_path: Path) -> None:
    fields = export_with(phi3(), tmp_path, unk_token="<unk>", eos_token="<|endoftext|>", ends=[2, 1])
    assert "phi-3" in fields["general.name"].lower()  # by which llama.cpp knows


@pytest.mark.parametrize(
    ("token", "pattern"),
    [
        (AddedToken("<|mask|>", lstrip=True, normalized=False), "in front of it.*lstrip"),
        (AddedToken("<|mask|>", rstrip=True, normalized=False), "swallows them.*rstrip"),
        (AddedToken("<|mask|>", single_word=True, normalized=False), "whole word"),
    ],
)
def test_other_blank_eaters_are_refused(tmp_path: Path, token: AddedToken, pattern: str) -> None:
    tokenizer = byte_level(None)
    tokenizer.add_special_tokens([token])
    source = model_with(tokenizer, tmp_path, chat_template="{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}")
    with pytest.raises(Incompatible, match=rf"<\|mask\|>.*{pattern}") as refused:
        check(source)
    assert refused.value.key == "model"


def test_blank_eaters_without_blanks_behind_them(tmp_path: Path) -> None:
    tokenizer, warnings = byte_level(None), list[str]()
    tokenizer.add_special_tokens([AddedToken("<|user|>", rstrip=True, normalized=False)])
    template = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}"
    export_with(tokenizer, tmp_path, Context(warn=warnings.append), chat_template=template)
    assert any("<|user|>" in warning for warning in warnings)


@pytest.mark.parametrize("name", ["microsoft/Phi-3-mini", "my phi3, phi3", "modern-bert-phi-3", "llama"])
def test_names_do_not_switch_rules_by_chance(name: str) -> None:
    switches = ("phi-3", "phi3", "modern-bert")
    assert not any(switch in model_name(name, strips=False).lower() for switch in switches)
    assert any(switch in model_name(name, strips=True).lower() for switch in switches[:2])


def test_a_piece_found_behind_spaces_only_is_refused(tmp_path: Path) -> None:
    tokenizer = sentencepiece()
    tokenizer.add_tokens([AddedToken("user_sym", normalized=True)])
    with pytest.raises(Incompatible, match="user_sym.*normalized"):
        check(model_with(tokenizer, tmp_path, unk_token="<unk>"))


def test_a_user_defined_piece_is_written(tmp_path: Path) -> None:
    tokenizer = sentencepiece()
    tokenizer.add_tokens([AddedToken("user_sym", normalized=False)])
    fields = export_with(tokenizer, tmp_path, unk_token="<unk>")
    assert fields["ggml.token_type"][fields["ggml.tokens"].index("user_sym")] == TokenType.USER_DEFINED


def test_a_sentencepiece_tokenizer_in_a_qwen2(tmp_path: Path) -> None:
    source = model_with(sentencepiece(), tmp_path / "model", unk_token="<unk>", model_type="qwen2")
    export_gguf(source, tmp_path / "out", GgufSettings(type="f16"), context=Context())
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    assert fields["general.architecture"].contents() == "qwen2" and fields["tokenizer.ggml.model"].contents() == "llama"


def test_generation_stops_at_every_end(tmp_path: Path) -> None:
    tokenizer, warnings = byte_level(None), list[str]()
    tokenizer.add_special_tokens(["<|stop|>", "<|im_end|>", "<|halt|>", "<|never|>"])
    last = tokenizer.get_vocab_size()
    ends = [1, *range(last - 4, last)]
    fields = export_with(tokenizer, tmp_path, Context(warn=warnings.append), ends=ends)
    assert (fields["ggml.eos_token_id"], fields["ggml.eot_token_id"], fields["ggml.eom_token_id"]) == (1, last - 4, last - 2)
    runtime = LlamaCppRuntime(tmp_path / "out", threads=1)
    assert LlamaCppText(runtime).ends == set(ends[:-1])  # llama.cpp knows <|im_end|> by its spelling
    runtime.close()
    assert any("<|never|>" in warning for warning in warnings)


def test_padding_beyond_the_embedding_is_left_out(tmp_path: Path) -> None:
    tokenizer, warnings = byte_level(None), list[str]()
    tokenizer.add_special_tokens(["<pad>"])
    rows = tokenizer.get_vocab_size() - 1
    fields = export_with(tokenizer, tmp_path, Context(warn=warnings.append), rows=rows, pad_token="<pad>")
    assert "<pad>" not in fields["ggml.tokens"] and len(fields["ggml.tokens"]) == rows and "ggml.padding_token_id" not in fields
    assert any("'<pad>' is left out" in warning for warning in warnings)


def test_named_chat_templates_are_kept(tmp_path: Path) -> None:
    templates = {"default": "{{ messages[0].content }}", "tool_use": "{{ 1 }}", "rag": "{{ 2 }}"}
    fields = export_with(byte_level(None), tmp_path, chat_template=templates)
    assert fields["chat_template"] == templates["default"] and fields["chat_templates"] == ["rag", "tool_use"]
    assert (fields["chat_template.rag"], fields["chat_template.tool_use"]) == ("{{ 2 }}", "{{ 1 }}")


def test_padding_and_truncation_of_the_file_do_not_count(tmp_path: Path) -> None:
    tokenizer = byte_level(None)
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8, pad_id=1, pad_token="</s>")
    assert export_with(tokenizer, tmp_path)["ggml.add_eos_token"] is False


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


def test_vocabulary_must_fit_and_end(tmp_path: Path) -> None:
    tokenizer = byte_level(None)
    size = tokenizer.get_vocab_size()
    with pytest.raises(Incompatible, match=f"has the id {size - 1}, but the embedding has only {size - 1} rows") as refused:
        check(model_with(tokenizer, tmp_path / "small", rows=size - 1))
    assert refused.value.key == "model"
    source = model_with(tokenizer, tmp_path / "model", bos_token=None, eos_token=None)
    config = json.loads((source / "config.json").read_text())
    for ids, special in (({"bos_token_id": 0, "eos_token_id": [1, 0]}, {"bos": 0, "eos": 1, "eot": 0}), ({"eos_token_id": None}, None)):
        (source / "generation_config.json").unlink(missing_ok=True)
        (source / "config.json").write_text(json.dumps(config | ids))
        if special:
            assert vocabulary_of(source).special == special
        else:
            with pytest.raises(Incompatible, match="end-of-text"):
                check(source)


def test_what_a_post_processor_may_add(tmp_path: Path) -> None:
    tokenizer = byte_level(None)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> <s> $A", special_tokens=[("<s>", 0)])
    with pytest.raises(Incompatible, match="nothing else"):
        check(model_with(tokenizer, tmp_path))


def test_a_crash_of_llama_cpp_is_an_error_not_the_end(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF, not really")
    with pytest.raises(EdgepressError, match=r"(?s)failed to tokenize \(exit code 1\).*version 1869488172.*cannot open"):
        native.prove_tokenizer(tmp_path / "model.gguf", vocabulary_of(checkpoint))
