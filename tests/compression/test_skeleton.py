"""Which tensors of a model's blocks no method claims."""

from pathlib import Path

import pytest

from compression.checkpoints.checkpoint import open_checkpoint
from compression.checkpoints.families import FAMILIES
from compression.checkpoints.skeleton import skeleton, unclaimed_tensors
from compression.context import Context
from compression.errors import Incompatible
from compression.pruning import UnstructuredSettings, prune_unstructured
from compression.quantization.fp8 import quantize_fp8
from compression.quantization.gptq import quantize_gptq
from compression.quantization.rtn import quantize_rtn
from compression.quantization.settings import FP8Settings, GPTQSettings, RTNSettings
from compression.training import TrainingSettings
from tests.tiny import tiny_checkpoint, tiny_windows
from tests.trainings import run_lottery, run_rigl

MORE = {
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "llama4_text": {"intermediate_size_mlp": 128, "num_local_experts": 8},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1},
}  # fmt: skip


def unclaimed(place: Path, model_type: str) -> list[str]:
    source = open_checkpoint(tiny_checkpoint(place, model_type, **MORE.get(model_type, {})))
    return unclaimed_tensors(skeleton(source), source)


@pytest.mark.parametrize("model_type", [*FAMILIES, "opt", "gpt_neox", "phi", "stablelm", "gemma4_text"])
def test_decoders_of_linear_layers_are_claimed_whole(tmp_path: Path, model_type: str) -> None:
    assert unclaimed(tmp_path, model_type) == []


@pytest.mark.parametrize(
    ("model_type", "of_a_block"),
    [
        ("llama4_text", ["feed_forward.experts.down_proj", "feed_forward.experts.gate_up_proj"]),
        ("mixtral", ["mlp.experts.down_proj", "mlp.experts.gate_up_proj", "mlp.gate.weight"]),
        ("falcon_h1", ["mamba.conv1d.weight"]),
    ],
)
def test_experts_routers_and_convolutions_are_named(tmp_path: Path, model_type: str, of_a_block: list[str]) -> None:
    assert unclaimed(tmp_path, model_type) == [f"model.layers.{block}.{path}" for block in (0, 1) for path in of_a_block]


def test_every_method_refuses_what_it_would_leave(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "in", "llama4_text", **MORE["llama4_text"])
    windows, out, context = tiny_windows(4), tmp_path / "out", Context()
    trained = {"sparsity": 0.5, "settings": TrainingSettings(steps=1), "workdir": tmp_path / "work", "context": context}
    for method in (
        lambda: quantize_rtn(source, out, RTNSettings(group_size=32), context=context),
        lambda: quantize_fp8(source, out, FP8Settings(), context=context),
        lambda: quantize_gptq(source, out, GPTQSettings(group_size=32), windows, context=context),
        lambda: prune_unstructured(source, out, UnstructuredSettings(method="magnitude", sparsity=0.5), context=context),
        lambda: run_rigl(source, out, windows, **trained),
        lambda: run_lottery(source, out, windows, **trained),
    ):
        with pytest.raises(Incompatible, match=r"4 tensors of its blocks.*experts\.gate_up_proj") as caught:
            method()
        assert caught.value.key == "model"
    assert not out.exists()
