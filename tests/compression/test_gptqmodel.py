"""GPTQModel as a judge of our checkpoints, and as an engine that writes them."""

import os
import random
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from compression.checkpoints.checkpoint import open_checkpoint
from compression.checkpoints.layouts import read_quantized_linears
from compression.checkpoints.loading import load_model
from compression.checkpoints.masks import write_masks
from compression.checkpoints.quantization_config import WeightScheme
from compression.checkpoints.shards import read_tensors
from compression.context import Context
from compression.errors import EdgepressError, Incompatible, MissingExtra, UnusableData
from compression.quantization.awq import quantize_awq
from compression.quantization.gptq import quantize_gptq
from compression.quantization.gptqmodel_engine import quantize_with_gptqmodel, summarize_log
from compression.quantization.grid import fit_grid
from compression.quantization.settings import AWQSettings, GPTQSettings, Override
from tests.tiny import tiny_checkpoint, tiny_windows

needs_gptqmodel = pytest.mark.skipif(
    find_spec("gptqmodel") is None,
    reason="gptqmodel is not installed: it judged none of our GPTQ and AWQ checkpoints (pip install 'edgepress[gptqmodel]')",
)
LINEARS = 14  # of the tiny checkpoint


def judge(path: Path) -> tuple[int, float]:
    """Open a GPTQ or AWQ checkpoint in transformers with GPTQModel and compare every dequantized weight with ours; layers seen, KL of logits."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float16, device_map="cpu")
    ours = load_model(path)
    seen = 0
    for name, module in theirs.named_modules():
        if hasattr(module, "dequantize_weight"):
            weight = module.dequantize_weight()
        elif hasattr(module, "awq_weight_dequantize"):
            weight = module.awq_weight_dequantize("cpu", torch.float16)
        else:
            continue
        assert torch.equal(weight.T.float(), ours.get_submodule(name).weight.half().float()), name
        seen += 1
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # it compiles, at 8 s a model
        p, q = (model(tiny_windows(4, seed=3)).logits.double().log_softmax(-1) for model in (ours, theirs))
    return seen, float((p.exp() * (p - q)).sum(-1).mean())


# The kernels for 4 bits multiply in bfloat16: KL 1.2e-4 and logits 0.1 apart for equal weights; the others 2e-6 and 0.015.
@needs_gptqmodel
@pytest.mark.parametrize(
    ("bits", "symmetric", "bound"), [(2, True, 1e-5), (3, False, 1e-5), (4, True, 5e-4), (4, False, 5e-4), (8, True, 1e-5)]
)
def test_it_dequantizes_our_gptq_checkpoints_to_the_same_weights(
    tmp_path: Path, checkpoint: Path, bits: int, symmetric: bool, bound: float
) -> None:
    quantize_gptq(
        checkpoint, tmp_path / "q", GPTQSettings(bits=bits, group_size=32, symmetric=symmetric), tiny_windows(), context=Context()
    )
    seen, kl = judge(tmp_path / "q")
    assert seen == LINEARS
    assert kl < bound


@needs_gptqmodel
def test_it_dequantizes_our_awq_checkpoints_to_the_same_weights(tmp_path: Path, checkpoint: Path) -> None:
    quantize_awq(checkpoint, tmp_path / "q", AWQSettings(group_size=32), tiny_windows(), context=Context())
    seen, kl = judge(tmp_path / "q")
    assert seen == LINEARS
    assert kl < 5e-4


def output_error(reference: Path, path: Path, windows: torch.Tensor) -> float:
    with torch.no_grad():
        return float((load_model(path)(windows).logits - load_model(reference)(windows).logits).square().mean())


@needs_gptqmodel
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_the_engine_writes_a_checkpoint_like_ours(tmp_path: Path, method: str) -> None:
    source = tiny_checkpoint(tmp_path / "llama", kv_heads=4, dtype=torch.float16)
    windows, done = tiny_windows(count=32), []
    here = sorted(Path.cwd().iterdir())
    before = (torch.get_rng_state(), np.random.get_state()[1], random.getstate())
    settings = GPTQSettings(group_size=32) if method == "gptq" else AWQSettings(group_size=32)
    metrics = quantize_with_gptqmodel(
        source, tmp_path / "q", settings, windows, context=Context(progress=lambda *args: done.append(args[:2]))
    )
    assert metrics == {"fallback_layers": 0.0, "damped_layers": 0.0}
    assert done == [(1, 2), (2, 2)]
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()
    assert before[2] == random.getstate()

    if isinstance(settings, GPTQSettings):
        quantize_gptq(source, tmp_path / "ours", settings, windows, context=Context())
    else:
        quantize_awq(source, tmp_path / "ours", settings, windows, context=Context())
    written, reference = open_checkpoint(tmp_path / "q"), open_checkpoint(tmp_path / "ours")
    assert written.tensors == reference.tensors
    assert written.config == reference.config
    layers = dict(read_quantized_linears(tmp_path / "q"))
    assert len(layers) == LINEARS and all(layer.storage_ordered for layer in layers.values())
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "q" / name).read_bytes() == (source / name).read_bytes()
    (embedding,), (dense,) = (read_tensors(path, ["model.embed_tokens.weight"]).values() for path in (tmp_path / "q", source))
    assert torch.equal(embedding, dense)
    assert judge(tmp_path / "q")[0] == LINEARS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "ours", "q"]  # and none of its logs, nor where this runs
    assert sorted(Path.cwd().iterdir()) == here

    model = load_model(source)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            grid = fit_grid(module.weight.data, WeightScheme(4, 32), symmetric=method == "gptq", shrinks=(1.0,))
            module.weight.data = grid.dequantize(grid.quantize(module.weight.data))
    with torch.no_grad():
        rounded = float((model(windows).logits - load_model(source)(windows).logits).square().mean())
    assert output_error(source, tmp_path / "q", windows) < rounded


@needs_gptqmodel
def test_the_same_input_gives_the_same_bytes(tmp_path: Path, checkpoint: Path) -> None:
    for name in ("a", "b"):
        torch.manual_seed(ord(name))
        quantize_with_gptqmodel(
            checkpoint, tmp_path / name, GPTQSettings(bits=3, group_size=32, symmetric=False), tiny_windows(), context=Context()
        )
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "b").iterdir())
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)


@needs_gptqmodel
def test_what_it_did_otherwise_is_counted_and_said(tmp_path: Path, checkpoint: Path) -> None:
    warnings: list[str] = []
    one_token = torch.full((2, 16), 5)
    metrics = quantize_with_gptqmodel(
        checkpoint, tmp_path / "q", GPTQSettings(group_size=32, damp_percent=1e-9), one_token, context=Context(warn=warnings.append)
    )
    assert metrics == {"fallback_layers": 0.0, "damped_layers": float(LINEARS)}
    assert len(warnings) == 1 and "from 1e-09 to invert the Hessian of block 0 self_attn." in warnings[0]


def test_layers_that_it_rounds_to_nearest_are_counted_and_said() -> None:
    warnings: list[str] = []
    losses = ("0.0000386160", "rtn fallback", "fallback(rtn): 0.0012345", "not applicable")
    log = [{"layer": 3, "module": f"linear{i}", "loss": loss, "damp": "0.01000" if i else None} for i, loss in enumerate(losses)]
    assert summarize_log(log, 0.01, Context(warn=warnings.append)) == {"fallback_layers": 2.0, "damped_layers": 0.0}
    assert warnings == ["GPTQModel rounded to nearest: block 3 linear1, block 3 linear2"]


@needs_gptqmodel
def test_its_failure_is_told_with_its_last_words(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(EdgepressError, match=r"(?s)GPTQModel failed \(exit code 1\).*damp_percent"):
        settings = GPTQSettings(group_size=32).model_copy(update={"damp_percent": 2.0})
        quantize_with_gptqmodel(checkpoint, tmp_path / "q", settings, tiny_windows(), context=Context())
    assert not (tmp_path / "q").exists()


def test_it_is_asked_for_where_it_is_missing(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compression.quantization.gptqmodel_engine.find_spec", lambda _: None)
    with pytest.raises(MissingExtra, match=r"gptqmodel.*edgepress\[gptqmodel\]"):
        quantize_with_gptqmodel(checkpoint, tmp_path / "q", GPTQSettings(group_size=32), tiny_windows(), context=Context())


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compression.quantization.gptqmodel_engine.find_spec", lambda _: True)
    patterns = GPTQSettings(group_size=32, layers={"*.down_proj": Override(bits=8)})
    for unfit, key in ((GPTQSettings(group_size=48), "group_size"), (AWQSettings(group_size=48), "group_size"), (patterns, "layers")):
        with pytest.raises(Incompatible) as refused:
            quantize_with_gptqmodel(checkpoint, tmp_path / "q", unfit, tiny_windows(), context=Context())
        assert refused.value.key == key
    with pytest.raises(UnusableData, match="10 tokens or more"):
        quantize_with_gptqmodel(checkpoint, tmp_path / "q", GPTQSettings(group_size=32), tiny_windows(length=8), context=Context())
    with pytest.raises(Incompatible, match="k_proj has 32; engine: edgepress"):
        quantize_with_gptqmodel(checkpoint, tmp_path / "q", AWQSettings(group_size=32), tiny_windows(), context=Context())
    phi, gemma = (tiny_checkpoint(tmp_path / family, family, kv_heads=4) for family in ("phi3", "gemma3_text"))
    for source, settings in ((phi, GPTQSettings(group_size=32)), (gemma, AWQSettings(group_size=32))):
        with pytest.raises(Incompatible, match="GPTQModel does not take") as refused:
            quantize_with_gptqmodel(source, tmp_path / "q", settings, tiny_windows(), context=Context())
        assert refused.value.key == "engine"
    write_masks(tmp_path / "phi3", {"model.layers.0.self_attn.o_proj.weight": torch.ones(64, 64, dtype=torch.bool)})
    with pytest.raises(Incompatible, match="carries masks"):
        quantize_with_gptqmodel(phi, tmp_path / "q", GPTQSettings(group_size=32), tiny_windows(), context=Context())
    quantize_gptq(checkpoint, tmp_path / "quantized", GPTQSettings(group_size=32), tiny_windows(), context=Context())
    with pytest.raises(Incompatible, match="quantized already"):
        quantize_with_gptqmodel(tmp_path / "quantized", tmp_path / "q", GPTQSettings(group_size=32), tiny_windows(), context=Context())
    assert not (tmp_path / "q").exists()
