"""A base normalised: against transformers' own classes and the tokenizers library."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from compression.checkpoints.checkpoint import UNLIMITED, open_checkpoint
from compression.checkpoints.loading import load_model, load_tokenizer
from compression.checkpoints.normalization import Normalized, normalize
from compression.checkpoints.shards import read_tensors
from compression.checkpoints.tokenizer_corpus import TEXTS
from compression.errors import UnusableModel
from tasks.base import EMBEDDED
from tests.tiny import tiny_checkpoint, tiny_tokenizer, tiny_windows

DEFAULTS = {  # what transformers 4 left out of a config where it was the class's default
    "gemma3_text": ("tie_word_embeddings", "head_dim", "sliding_window", "layer_types"),
    "smollm3": ("tie_word_embeddings", "no_rope_layers", "layer_types"),
    "qwen3": ("head_dim", "layer_types", "tie_word_embeddings"),
    "mistral": ("sliding_window", "tie_word_embeddings"),
    "llama": ("tie_word_embeddings", "head_dim", "num_key_value_heads"),
}


def edit(file: Path, **changes: Any) -> None:
    """Put values into a JSON file; None removes a key."""
    document = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))


def edit_weights(path: Path, **changes: torch.Tensor | None) -> None:
    tensors: dict[str, Any] = load_file(path / "model.safetensors") | changes
    save_file(
        {name: tensor for name, tensor in tensors.items() if tensor is not None}, path / "model.safetensors", metadata={"format": "pt"}
    )


def test_the_embedded_model_is_normal(tmp_path: Path) -> None:
    assert normalize(EMBEDDED, tmp_path / "out") == Normalized(False, (), open_checkpoint(EMBEDDED).limits)


@pytest.mark.parametrize("model_type", sorted(DEFAULTS))
def test_absent_settings_are_the_class_defaults(tmp_path: Path, model_type: str) -> None:
    width = {"heads": 1, "kv_heads": 1, "hidden": 256} if model_type == "gemma3_text" else {"heads": 1, "kv_heads": 1, "hidden": 128}
    path = tiny_checkpoint(tmp_path / "m", model_type, **width)  # type: ignore[arg-type]
    edit(path / "config.json", **dict.fromkeys(DEFAULTS[model_type]))
    resolved = AutoConfig.from_pretrained(path)
    if not resolved.tie_word_embeddings:
        edit_weights(path, **{"lm_head.weight": torch.randn(320, resolved.hidden_size)})
    assert normalize(path, tmp_path / "out").changed
    found = open_checkpoint(tmp_path / "out").config
    for key in DEFAULTS[model_type]:
        assert found[key] == getattr(resolved, key)
    ids = tiny_windows(2)
    torch.testing.assert_close(load_model(tmp_path / "out")(ids).logits, load_model(path)(ids).logits)


def test_old_spellings_come_out_alike(tmp_path: Path, checkpoint: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "old")
    theta = json.loads((checkpoint / "config.json").read_text())["rope_parameters"]["rope_theta"]
    edit(tmp_path / "old" / "config.json", rope_parameters=None, dtype=None, torch_dtype="float32", rope_theta=theta, rope_scaling=None)
    normalize(tmp_path / "old", tmp_path / "out")
    original = {key: value for key, value in json.loads((checkpoint / "config.json").read_text()).items() if key != "transformers_version"}
    found = open_checkpoint(tmp_path / "out").config
    assert {key: found.get(key) for key in original} == original and "rope_theta" not in found and "torch_dtype" not in found


def unlisted(path: Path, model_type: str, **settings: object) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, vocab_size=320, **settings)).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("model_type", "settings", "limit"),
    [
        ("bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4}, UNLIMITED),
        ("gptj", {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 128}, 128),
        ("gpt_neo", {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]}, 2048),
        ("mpt", {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 96}, 96),
        ("mamba", {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}, UNLIMITED),
        ("gpt_bigcode", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}, 128),
    ],
)
def test_other_spellings_get_standard_names(tmp_path: Path, model_type: str, settings: dict[str, object], limit: int) -> None:
    path = unlisted(tmp_path / "m", model_type, **settings)
    normalize(path, tmp_path / "out")
    found = open_checkpoint(tmp_path / "out")
    assert (found.num_layers, found.hidden_size, found.vocab_size, found.max_length) == (2, 64, 320, limit)
    ids = tiny_windows(1, 16)
    torch.testing.assert_close(load_model(tmp_path / "out")(ids).logits, load_model(path)(ids).logits)


def test_auto_map_is_ignored_where_transformers_knows_the_type(tmp_path: Path, checkpoint: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "m")
    edit(tmp_path / "m" / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Model"})
    assert any("auto_map" in warning for warning in normalize(tmp_path / "m", tmp_path / "out").warnings)
    assert "auto_map" not in open_checkpoint(tmp_path / "out").config


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "of_tomorrow", "auto_map": {"AutoConfig": "x.Y"}}, "code of its own"),
        ({"model_type": "of_tomorrow"}, "of_tomorrow"),
        ({"model_type": "gemma3", "text_config": {}, "vision_config": {}}, "gemma3_text"),
        ({"vocab_size": None, "model_type": "bert"}, "lacks"),
        ({"model_type": "vit"}, "not a causal language model"),
        ({"num_attention_heads": 6, "num_key_value_heads": 2}, "not a multiple"),
        ({"num_hidden_layers": 3}, r"lacks model\.layers\.2"),
        ({"num_hidden_layers": 1}, r"does not know model\.layers\.1"),
        ({"tie_word_embeddings": False}, r"lacks lm_head\.weight"),
        ({"intermediate_size": 96}, "other shapes"),
    ],
)
def test_refusals_name_the_cause(tmp_path: Path, checkpoint: Path, changes: dict[str, Any], says: str) -> None:
    shutil.copytree(checkpoint, tmp_path / "m")
    edit(tmp_path / "m" / "config.json", **changes)
    with pytest.raises(UnusableModel, match=says) as refused:
        normalize(tmp_path / "m", tmp_path / "out")
    assert refused.value.key == "model"


def test_doubles_are_refused(tmp_path: Path, checkpoint: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "m")
    edit_weights(tmp_path / "m", **{name: tensor.double() for name, tensor in load_file(checkpoint / "model.safetensors").items()})
    with pytest.raises(UnusableModel, match="float64"):
        normalize(tmp_path / "m", tmp_path / "out")


@pytest.mark.parametrize("own", [True, False])
def test_a_tied_model_with_a_head_in_its_files(tmp_path: Path, checkpoint: Path, own: bool) -> None:
    """transformers ties nothing where the values differ; where they are equal the head is no tensor of its own."""
    shutil.copytree(checkpoint, tmp_path / "m")
    embedding = load_file(checkpoint / "model.safetensors")["model.embed_tokens.weight"]
    edit_weights(tmp_path / "m", **{"lm_head.weight": embedding.flip(0).contiguous() if own else embedding.clone()})
    normalize(tmp_path / "m", tmp_path / "out")
    found = open_checkpoint(tmp_path / "out")
    assert found.tied is not own and ("lm_head.weight" in found.tensors) is own
    ids = tiny_windows(2)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()(ids).logits
    torch.testing.assert_close(load_model(tmp_path / "out")(ids).logits, expected)


def test_leftovers_are_not_read(tmp_path: Path, checkpoint: Path) -> None:
    """Old files of Llama hold rotary frequencies, which transformers computes."""
    shutil.copytree(checkpoint, tmp_path / "m")
    edit_weights(tmp_path / "m", **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    normalize(tmp_path / "m", tmp_path / "out")
    found = open_checkpoint(tmp_path / "out")
    assert found.tensors.keys() == open_checkpoint(checkpoint).tensors.keys()
    torch.testing.assert_close(read_tensors(tmp_path / "out", found.tensors), load_file(checkpoint / "model.safetensors"))


def test_shards_stay_shards(tmp_path: Path, checkpoint: Path) -> None:
    model = load_model(checkpoint)
    model.save_pretrained(tmp_path / "m", max_shard_size="50KB")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    assert not normalize(tmp_path / "m", tmp_path / "out").changed
    torch.testing.assert_close(load_model(tmp_path / "out").state_dict(), model.state_dict())


def test_truncation_and_padding_are_switched_off(tmp_path: Path, checkpoint: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "m")
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokenizer.enable_truncation(max_length=4)
    tokenizer.enable_padding(length=4, pad_id=1, pad_token="</s>")
    tokenizer.save(str(tmp_path / "m" / "tokenizer.json"))
    assert len(normalize(tmp_path / "m", tmp_path / "out").warnings) == 1
    for directory in (tmp_path / "m", tmp_path / "out"):
        assert [load_tokenizer(directory)(text).input_ids for text in TEXTS] == [
            load_tokenizer(checkpoint)(text).input_ids for text in TEXTS
        ]
    assert (tmp_path / "out" / "tokenizer.json").read_text().count('"padding": null') == 1


def test_tokenizer_json_is_the_truth(tmp_path: Path, checkpoint: Path) -> None:
    """A GPT2Tokenizer is rebuilt by transformers without the Digits of its file, whose shape is SmolLM's."""
    shutil.copytree(checkpoint, tmp_path / "m")
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.save(str(tmp_path / "m" / "tokenizer.json"))
    edit(tmp_path / "m" / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    expected = [tokenizer.encode(text).ids for text in TEXTS]
    assert [AutoTokenizer.from_pretrained(tmp_path / "m")(text).input_ids for text in TEXTS] != expected  # what this is about
    assert any("tokenizer.json" in warning for warning in normalize(tmp_path / "m", tmp_path / "out").warnings)
    for opened in (load_tokenizer(tmp_path / "m"), load_tokenizer(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")):
        assert [opened(text).input_ids for text in TEXTS] == expected


@pytest.mark.parametrize(
    ("model_type", "settings", "trains"),
    [
        ("granite", {"logits_scaling": 4.0}, False),
        ("cohere", {"logit_scale": 0.0625}, False),
        ("gemma2", {}, False),
        ("llama4_text", {"num_local_experts": 2, "intermediate_size_mlp": 128}, False),  # names no base model
        ("olmo2", {}, True),
    ],
)
def test_what_training_cannot_read_is_found(tmp_path: Path, model_type: str, settings: dict[str, object], trains: bool) -> None:
    path = tiny_checkpoint(tmp_path / "m", model_type, **settings)  # type: ignore[arg-type]
    logging.getLogger("transformers").setLevel(logging.ERROR)
    assert bool(normalize(path, tmp_path / "out").limits.training) is not trains
