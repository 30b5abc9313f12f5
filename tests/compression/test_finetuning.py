"""LoRA and full fine-tuning, judged by plain transformers and peft on what was written."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compression.checkpoints.loading import load_model
from compression.checkpoints.masks import read_masks, write_masks
from compression.context import Context
from compression.errors import EdgepressError, Incompatible, MissingExtra
from compression.finetuning.adapters import merged
from compression.pruning import UnstructuredSettings, prune_unstructured
from compression.training import TrainingSettings
from tests.tiny import tiny_checkpoint, tiny_windows
from tests.trainings import run_finetuning

SETTINGS = TrainingSettings(steps=12, batch_size=4, learning_rate=2e-2, save_every=5)


def tune(model: Path, place: Path, **parameters: object) -> dict[str, float]:
    return run_finetuning(
        model, place / "out", tiny_windows(4), settings=SETTINGS, workdir=place / "work",
        **{"context": Context(seed=2), "adapter_out": place / "adapter", **parameters},
    )  # fmt: skip


def loss(path: Path) -> float:
    """Cross-entropy as transformers computes it."""
    rows = tiny_windows(4)
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(rows, labels=rows).loss.item()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_learns_the_rows(tmp_path: Path, checkpoint: Path, method: str) -> None:
    curve: list[dict[str, float]] = []
    context = Context(metrics=lambda values, step: curve.append(dict(values)))
    tune(checkpoint, tmp_path, method=method, rank=8, context=context)
    assert loss(tmp_path / "out") < 0.8 * loss(checkpoint)
    assert curve[0]["loss"] == pytest.approx(loss(checkpoint), rel=1e-4)
    assert (tmp_path / "adapter").exists() == (method == "lora")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == load_file(checkpoint / "model.safetensors").keys()


def test_the_merge_is_the_formula_and_the_adapter_opens_in_peft(tmp_path: Path, checkpoint: Path) -> None:
    metrics = tune(checkpoint, tmp_path, rank=4, alpha=12, target_modules=["q_proj", "down_proj"])
    assert metrics["trainable_parameters"] == 2 * 4 * (64 + 64 + 128 + 64)
    before, after = (load_file(path / "model.safetensors") for path in (checkpoint, tmp_path / "out"))
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, weight in before.items():
        changed = any(module in name for module in ("q_proj", "down_proj"))
        expected = weight.double()
        if changed:
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            expected = expected + 12 / 4 * adapter[f"{stem}.lora_B.weight"].double() @ adapter[f"{stem}.lora_A.weight"].double()
            assert not torch.equal(weight, after[name])
        torch.testing.assert_close(after[name].double(), expected, rtol=1e-5, atol=1e-6)
    rows = tiny_windows(2)
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(rows).logits
        torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path / "adapter")(rows).logits, merged, rtol=1e-4, atol=1e-4)


def test_the_adapter_names_no_path_of_this_machine(tmp_path: Path, checkpoint: Path) -> None:
    tune(checkpoint, tmp_path, rank=2)
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    text = (tmp_path / "adapter" / "adapter_config.json").read_text()
    assert str(checkpoint) not in text
    modules = json.loads(text)["target_modules"]
    assert modules == sorted(modules)
    assert not any("lm_head" in name for name in modules)


def test_is_merged_in_float32_and_saved_as_the_base_was(tmp_path: Path) -> None:
    """In float16 arithmetic W + s·B·A differs from the float32 sum rounded once."""
    base = tiny_checkpoint(tmp_path / "base", dtype=torch.float16)
    save_file({"kept": torch.arange(4)}, base / "kept.safetensors")
    tune(base, tmp_path, rank=4, alpha=8, target_modules=["up_proj"])
    before, after = (load_file(path / "model.safetensors") for path in (base, tmp_path / "out"))
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    name = "model.layers.0.mlp.up_proj"
    delta = 2 * adapter[f"base_model.model.{name}.lora_B.weight"] @ adapter[f"base_model.model.{name}.lora_A.weight"]
    assert torch.equal(after[f"{name}.weight"], (before[f"{name}.weight"].float() + delta).half())
    assert (tmp_path / "out" / "kept.safetensors").read_bytes() == (base / "kept.safetensors").read_bytes()


def test_a_killed_run_ends_in_the_same_bytes(tmp_path: Path, checkpoint: Path) -> None:
    """With dropout, so that the random state decides; the frozen weights are not in the checkpoints."""

    def dies(done: int, total: int, what: str) -> None:
        if done == 7:
            raise InterruptedError

    tune(checkpoint, tmp_path / "whole", dropout=0.2, rank=2)
    with pytest.raises(InterruptedError):
        tune(checkpoint, tmp_path / "killed", dropout=0.2, rank=2, context=Context(seed=2, progress=dies))
    saved = torch.load(tmp_path / "killed" / "work" / "checkpoint-5" / "trainable.pt", weights_only=True)
    assert all("lora_" in name for name in saved["weights"])
    assert tune(checkpoint, tmp_path / "killed", dropout=0.2, rank=2)["resumed_from_step"] == 5
    for file in ("out/model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "killed" / file).read_bytes()


@pytest.mark.parametrize("other", ["alpha", "dropout", "weights"])
def test_another_method_or_model_does_not_go_on(tmp_path: Path, checkpoint: Path, other: str) -> None:
    tune(checkpoint, tmp_path, rank=2, target_modules=["q_proj"])
    base = tiny_checkpoint(tmp_path / "base", seed=1) if other == "weights" else checkpoint
    given = {} if other == "weights" else {other: 0.5 if other == "dropout" else 7}
    with pytest.raises(EdgepressError, match="another method, on another model"):
        tune(base, tmp_path, rank=2, target_modules=["q_proj"], **given)


@pytest.mark.parametrize("modules", [["lm_head", "q_proj"], ["embed_tokens"], r".*(embed_tokens|q_proj)"])
def test_adapters_on_a_tied_end_are_refused(tmp_path: Path, checkpoint: Path, modules: str | list[str]) -> None:
    with pytest.raises(Incompatible, match="tie_word_embeddings") as caught:
        tune(checkpoint, tmp_path, target_modules=modules)
    assert caught.value.key == "target_modules"
    assert not (tmp_path / "work").exists()


def test_untied_ends_take_adapters(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base", tied=False)
    tune(base, tmp_path, target_modules=["lm_head", "embed_tokens"])
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tiny_windows(2)).logits
        torch.testing.assert_close(
            PeftModel.from_pretrained(model, tmp_path / "adapter")(tiny_windows(2)).logits, merged, rtol=1e-4, atol=1e-4
        )


def test_a_merge_that_says_something_else_is_refused(checkpoint: Path) -> None:
    """An adapter on a tied head, put there by peft itself: merged, it changes the embedding too."""
    adapted = get_peft_model(load_model(checkpoint), LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    with pytest.raises(EdgepressError, match="diverge") as caught:
        merged(adapted, tiny_windows(2))
    assert caught.value.key == "target_modules"


def test_routers_get_no_adapter(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base", "phimoe", tied=False, num_local_experts=2)
    warned: list[str] = []
    tune(base, tmp_path, rank=2, context=Context(warn=warned.append))
    assert "model.layers.0.mlp.router" in warned[0]
    assert not any("router" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    with pytest.raises(Incompatible, match="router") as caught:
        tune(base, tmp_path / "named", target_modules=["router"])
    assert caught.value.key == "target_modules"


def test_a_model_without_a_base_model_is_refused(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base", "llama4_text", intermediate_size_mlp=128, num_local_experts=2)
    with pytest.raises(Incompatible, match="base_model_prefix"):
        tune(base, tmp_path, target_modules=["q_proj"])


def test_only_the_answer_is_learned_where_the_prompt_is_masked(tmp_path: Path, checkpoint: Path) -> None:
    """The gradient of a masked target is exactly nothing: other targets under the mask, where nothing reads them, same weights."""
    rows, mask = tiny_windows(4), torch.arange(32)[None].expand(4, -1) < 20
    other = rows.clone()
    other[:, 20:] = tiny_windows(4, seed=9)[:, 20:]
    for name, tokens in (("one", rows), ("two", other)):
        run_finetuning(
            checkpoint, tmp_path / name, tokens, mask=mask, method="full", settings=SETTINGS,
            workdir=tmp_path / f"{name}-work", context=Context(),
        )  # fmt: skip
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-4, atol=1e-5)


def test_refusals(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(EdgepressError, match="no_such_proj") as caught:
        tune(checkpoint, tmp_path, target_modules=["no_such_proj"])
    assert caught.value.key == "target_modules"
    assert not (tmp_path / "out").exists()


def test_dora_is_the_formula(tmp_path: Path, checkpoint: Path) -> None:
    """m · (W + s·B·A) / ‖W + s·B·A‖ by rows, in float64, of the adapter as it is kept."""
    tune(checkpoint, tmp_path, method="dora", rank=4, alpha=8, target_modules=["up_proj"])
    assert loss(tmp_path / "out") < loss(checkpoint)
    before, after = (load_file(path / "model.safetensors") for path in (checkpoint, tmp_path / "out"))
    adapter = {name: tensor.double() for name, tensor in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items()}
    for block in range(2):
        name = f"model.layers.{block}.mlp.up_proj"
        stem = f"base_model.model.{name}"
        moved = before[f"{name}.weight"].double() + 2 * adapter[f"{stem}.lora_B.weight"] @ adapter[f"{stem}.lora_A.weight"]
        expected = adapter[f"{stem}.lora_magnitude_vector"][:, None] * moved / moved.norm(dim=1, keepdim=True)
        torch.testing.assert_close(after[f"{name}.weight"].double(), expected, rtol=1e-4, atol=1e-5)
        plain = before[f"{name}.weight"].double().norm(dim=1)
        assert (adapter[f"{stem}.lora_magnitude_vector"] - plain).abs().max() > 1e-2  # the norms were trained too


def test_dora_of_a_sparse_model_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    sparse = tmp_path / "sparse"
    shutil.copytree(checkpoint, sparse)
    write_masks(sparse, {"model.layers.0.mlp.up_proj.weight": torch.rand(128, 64) > 0.5})
    with pytest.raises(Incompatible, match="dora") as caught:
        tune(sparse, tmp_path, method="dora")
    assert caught.value.key == "method"


def test_ranks_by_pattern_and_modules_by_pattern(tmp_path: Path, checkpoint: Path) -> None:
    tune(checkpoint, tmp_path, rank=4, target_modules=r".*layers\.1\..*_proj", rank_pattern={"mlp.up_proj": 6, "[kv]_proj": 2})
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    ranks = {name.split("layers.")[1].removesuffix(".lora_A.weight"): len(t) for name, t in adapter.items() if "lora_A" in name}
    assert ranks == {
        **{f"1.self_attn.{name}_proj": rank for name, rank in {"q": 4, "k": 2, "v": 2, "o": 4}.items()},
        **{f"1.mlp.{name}_proj": rank for name, rank in {"gate": 4, "up": 6, "down": 4}.items()},
    }
    with pytest.raises(EdgepressError, match="no_proj") as caught:
        tune(checkpoint, tmp_path / "wrong", rank_pattern={"no_proj": 2})
    assert caught.value.key == "rank_pattern"


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="qlora needs bitsandbytes")
@pytest.mark.parametrize("is_sparse", [False, True])
def test_qlora_trains_over_four_bits_and_merges_into_full_precision(tmp_path: Path, checkpoint: Path, is_sparse: bool) -> None:
    base = checkpoint
    if is_sparse:
        prune_unstructured(checkpoint, tmp_path / "sparse", UnstructuredSettings(method="magnitude", sparsity=0.5), context=Context())
        base = tmp_path / "sparse"
    curve: list[dict[str, float]] = []
    context = Context(metrics=lambda values, step: curve.append(dict(values)))
    tune(base, tmp_path, method="qlora", rank=4, alpha=8, context=context)
    assert curve[0]["loss"] == pytest.approx(loss(base), rel=0.05)
    assert curve[0]["loss"] != pytest.approx(loss(base), rel=1e-4)  # of the weights in four bits
    assert curve[-1]["loss"] < 0.9 * curve[0]["loss"]
    before, after = (load_file(path / "model.safetensors") for path in (base, tmp_path / "out"))
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    masks = read_masks(base)
    for name, weight in before.items():
        expected = weight.double()
        if "_proj" in name:
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            update = 2 * adapter[f"{stem}.lora_B.weight"].double() @ adapter[f"{stem}.lora_A.weight"].double()
            expected = expected + update * masks.get(name, torch.ones(1))
        torch.testing.assert_close(after[name].double(), expected, rtol=1e-5, atol=1e-6)
    assert bool(masks) == is_sparse == bool(read_masks(tmp_path / "out"))


def test_qlora_without_its_package_is_refused(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compression.finetuning.settings.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"bitsandbytes.*pip install 'edgepress\[qlora\]'"):
        tune(checkpoint, tmp_path, method="qlora")
    assert not (tmp_path / "out").exists()
