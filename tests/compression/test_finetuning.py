"""LoRA and full fine-tuning, judged by plain transformers and peft on what was written."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compression.context import Context
from compression.errors import EdgepressError, Incompatible
from compression.finetuning import finetune
from compression.training_settings import TrainingSettings
from tests.tiny import tiny_checkpoint, tiny_windows

SETTINGS = TrainingSettings(steps=12, batch_size=4, learning_rate=2e-2, save_every=5)


def tune(model: Path, place: Path, **parameters: object) -> dict[str, float]:
    return finetune(
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
    assert all("lora_" in name for name in saved)
    assert tune(checkpoint, tmp_path / "killed", dropout=0.2, rank=2)["resumed_from_step"] == 5
    for file in ("out/model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "killed" / file).read_bytes()


def test_only_the_answer_is_learned_where_the_prompt_is_masked(tmp_path: Path, checkpoint: Path) -> None:
    """The gradient of a masked target is exactly nothing: other targets under the mask, where nothing reads them, same weights."""
    rows, mask = tiny_windows(4), torch.arange(32)[None].expand(4, -1) < 20
    other = rows.clone()
    other[:, 20:] = tiny_windows(4, seed=9)[:, 20:]
    for name, tokens in (("one", rows), ("two", other)):
        finetune(
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
    sparse = tiny_checkpoint(tmp_path / "sparse")
    save_file({"mask": torch.zeros(1)}, sparse / "masks.safetensors")
    with pytest.raises(Incompatible, match="sparse"):
        tune(sparse, tmp_path)
    assert not (tmp_path / "out").exists()
