"""The dequantizing loader against weights put together by hand, and the shard writer against transformers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compression.checkpoints.checkpoint import open_checkpoint
from compression.checkpoints.layouts import read_quantized_linears
from compression.checkpoints.loading import load_model, save_model
from compression.checkpoints.shards import CheckpointWriter, read_tensors
from compression.context import Context
from compression.errors import EdgepressError, UnusableModel
from compression.quantization.awq import quantize_awq
from compression.quantization.gptq import quantize_gptq
from compression.quantization.settings import AWQSettings, GPTQSettings
from tests.tiny import tiny_checkpoint, tiny_windows


def nibble(words: torch.Tensor, row: int, column: int, place: int) -> int:
    return int(words[row, column]) >> (4 * place) & 15


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_quantized_checkpoint_opens_as_the_model_its_tensors_spell(tmp_path: Path, method: str, tied: bool) -> None:
    source = tiny_checkpoint(tmp_path / "in", "qwen2", tied=tied, layers=1, dtype=torch.float16)
    quantize, settings = (quantize_gptq, GPTQSettings) if method == "gptq" else (quantize_awq, AWQSettings)
    quantize(source, tmp_path / "q", settings(group_size=32), tiny_windows(), context=Context())
    stored = load_file(tmp_path / "q" / "model.safetensors")
    model = load_model(tmp_path / "q")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training
    for name in ("self_attn.v_proj", "mlp.down_proj"):
        path = f"model.layers.0.{name}"
        words, zeros, scales = (stored[f"{path}.{suffix}"] for suffix in ("qweight", "qzeros", "scales"))
        weight = model.get_submodule(path).weight
        for o, i in ((0, 0), (7, 9), (13, 33), (31, 63)):
            if method == "gptq":
                code, zero = nibble(words, i // 8, o, i % 8), nibble(zeros, i // 32, o // 8, o % 8) + 1
            else:
                place = (0, 4, 1, 5, 2, 6, 3, 7)[o % 8]
                code, zero = nibble(words, i, o // 8, place), nibble(zeros, i // 32, o // 8, place)
            assert float(weight[o, i]) == (code - zero) * float(scales[i // 32, o])
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight) == tied
    assert torch.equal(model.model.norm.weight, stored["model.norm.weight"].float())
    with torch.no_grad():
        dense = load_model(source)(tiny_windows()).logits
        assert float((model(tiny_windows()).logits - dense).std()) < 0.4 * float(dense.std())


def test_dtype_none_keeps_the_checkpoints(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "in", dtype=torch.bfloat16)
    quantize_gptq(source, tmp_path / "q", GPTQSettings(group_size=32), tiny_windows(), context=Context())
    for path in (source, tmp_path / "q"):
        assert {parameter.dtype for parameter in load_model(path, dtype=None).parameters()} == {torch.bfloat16}


def test_groups_in_another_order_and_zeros_as_they_are(tmp_path: Path, checkpoint: Path) -> None:
    """GPTQ as others write it: act-order without static groups (g_idx not in storage order), format gptq_v2."""
    quantize_gptq(checkpoint, tmp_path / "q", GPTQSettings(group_size=32), tiny_windows(), context=Context())
    file = tmp_path / "q" / "model.safetensors"
    tensors = load_file(file)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)).to(torch.int32) // 32
    path = "model.layers.0.self_attn.q_proj"
    tensors[f"{path}.g_idx"] = order
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    config["quantization_config"] |= {"checkpoint_format": "gptq_v2", "desc_act": True}
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    layer = dict(read_quantized_linears(tmp_path / "q"))[path]
    assert not layer.storage_ordered
    assert (layer.zeros == 7).all()
    weight = load_model(tmp_path / "q").get_submodule(path).weight
    for o, i in ((0, 0), (5, 17), (63, 63)):
        assert float(weight[o, i]) == (int(layer.codes[o, i]) - 7) * float(layer.scales[o, int(order[i])])


def change_config(path: Path, **entries: object) -> None:
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] |= entries
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"bits": 5}, "bits 5"),
        ({"group_size": None}, "group_size None"),
        ({"checkpoint_format": "marlin"}, "format 'marlin'"),
        ({"quant_method": "awq", "version": "exllama"}, "version 'exllama'"),
        ({"quant_method": "bitsandbytes"}, "layout 'bitsandbytes'"),
    ],
)
def test_layouts_that_are_not_read_are_refused(tmp_path: Path, checkpoint: Path, entries: dict[str, object], says: str) -> None:
    quantize_gptq(checkpoint, tmp_path / "q", GPTQSettings(group_size=32), tiny_windows(2), context=Context())
    change_config(tmp_path / "q", **entries)
    with pytest.raises(UnusableModel, match=says):
        load_model(tmp_path / "q")


@pytest.mark.parametrize(
    ("gone", "says"), [("model.layers.0.mlp.up_proj.scales", "up_proj lacks"), ("model.norm.weight", "lacks model.norm")]
)
def test_a_quantized_checkpoint_with_missing_tensors_is_refused(tmp_path: Path, checkpoint: Path, gone: str, says: str) -> None:
    quantize_gptq(checkpoint, tmp_path / "q", GPTQSettings(group_size=32), tiny_windows(2), context=Context())
    file = tmp_path / "q" / "model.safetensors"
    tensors = load_file(file)
    del tensors[gone]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UnusableModel, match=says):
        load_model(tmp_path / "q")


def test_shards_open_in_transformers(tmp_path: Path, checkpoint: Path) -> None:
    source = open_checkpoint(checkpoint)
    shutil.copytree(checkpoint, tmp_path / "out", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    writer = CheckpointWriter(tmp_path / "out", shard_bytes=60_000)
    for name in source.tensors:
        writer.add(read_tensors(checkpoint, [name]))
    assert not (tmp_path / "out" / "config.json").exists()
    with pytest.raises(EdgepressError, match=r"1 are missing \(model\.nothing"):
        writer.finish(source.config, names=[*source.tensors, "model.nothing"])
    assert not (tmp_path / "out" / "config.json").exists()
    writer.finish(source.config, names=source.tensors)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    assert not list((tmp_path / "out").glob("*.partial"))
    assert open_checkpoint(tmp_path / "out").tensors == source.tensors
    copy = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name, parameter in load_model(checkpoint).named_parameters():
        assert torch.equal(copy.get_parameter(name), parameter)
    with pytest.raises(UnusableModel, match=r"no tensor model\.nothing"):
        read_tensors(tmp_path / "out", ["model.nothing"])


def test_a_model_with_other_tensors_than_its_source_is_not_saved(tmp_path: Path, checkpoint: Path) -> None:
    model = load_model(checkpoint)
    source = shutil.copytree(checkpoint, tmp_path / "in")
    tensors = load_file(source / "model.safetensors")
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8), "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(tensors | old, source / "model.safetensors", metadata={"format": "pt"})
    save_model(model, tmp_path / "out", like=source)  # what older versions wrote, and a tied head
    save_file(tensors | {"model.layers.0.layer_scalar": torch.ones(1)}, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EdgepressError, match=r"1 are missing \(model\.layers\.0\.layer_scalar"):
        save_model(model, tmp_path / "again", like=source)
