"""The walk against transformers' own forward pass."""

from pathlib import Path

import pytest
import torch

from compression.calibration import Block, compress_blocks, walk
from compression.checkpoint import open_checkpoint
from compression.context import Context
from compression.errors import Incompatible, UnusableData
from compression.loading import load_model
from compression.shards import read_tensors
from tests.tiny import tiny_checkpoint, tiny_windows

FAMILIES = {
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "mistral": {"sliding_window": 8},  # shorter than the windows, so that a wrong mask shows
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {},
}


def second_moments(path: Path, windows: torch.Tensor, change: dict[str, float] | None = None) -> dict[str, torch.Tensor]:
    """Mean of x xᵀ of every block's linear layers in a plain forward pass, in float64; `change` multiplies weights before."""
    model = load_model(path)
    for name, factor in (change or {}).items():
        model.get_parameter(name).data.mul_(factor)
    moments: dict[str, torch.Tensor] = {}

    def hook(name: str):
        def before(_, arguments):
            x = arguments[0].detach().double().flatten(0, 1)
            moments[name] = x.T @ x / len(x)

        return before

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(hook(name))
    with torch.no_grad():
        model(windows)
    return moments


@pytest.mark.parametrize("model_type", FAMILIES)
def test_second_moments_are_those_of_a_plain_forward_pass(tmp_path: Path, model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_checkpoint(tmp_path / model_type, model_type, layers=3, dtype=torch.float16, **FAMILIES[model_type])
    windows = tiny_windows(count=5)
    monkeypatch.setattr("compression.calibration.TOKENS_PER_BATCH", 64)  # batches of 2, 2 and 1 windows
    change = {"model.layers.0.mlp.down_proj.weight": 0.25, "model.layers.1.self_attn.o_proj.weight": -1.5}
    # a block is changed only after its inputs were seen
    in_front = [{}, {name: factor for name, factor in change.items() if ".0." in name}, change]
    seen = []
    for block in walk(open_checkpoint(path), windows, context=Context()):
        expected = second_moments(path, windows, in_front[block.index])
        for shared in block.inputs:
            assert shared.tokens == windows.numel()
            for layer in shared.layers:
                seen.append(f"{block.name}.{layer}")
                torch.testing.assert_close(shared.gram.double(), expected[seen[-1]], rtol=1e-4, atol=1e-5)
        for name, factor in change.items():
            if name.startswith(f"{block.name}."):
                block.linear(name.removeprefix(f"{block.name}.").removesuffix(".weight")).weight.mul_(factor)
    assert sorted(seen) == sorted(expected)


def test_layers_that_read_one_tensor_are_counted_once(checkpoint: Path) -> None:
    blocks = [[shared.layers for shared in block.inputs] for block in walk(open_checkpoint(checkpoint), tiny_windows(), context=Context())]
    attention = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    assert blocks == [[attention, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)]] * 2


def test_only_one_block_has_weights_at_a_time(checkpoint: Path) -> None:
    previous: Block | None = None
    for block in walk(open_checkpoint(checkpoint), tiny_windows(), context=Context()):
        assert not any(parameter.is_meta for parameter in block.module.parameters())
        if previous is not None:
            assert all(parameter.is_meta for parameter in previous.module.parameters())
            assert not previous.inputs
        previous = block


@pytest.mark.parametrize("tied", [True, False])
def test_a_walk_that_changes_nothing_writes_the_same_tensors(tmp_path: Path, tied: bool) -> None:
    source = tiny_checkpoint(tmp_path / "in", "qwen2", tied=tied, dtype=torch.bfloat16)
    steps: list[tuple[int, int]] = []
    context = Context(progress=lambda done, total, what: steps.append((done, total)))
    compress_blocks(source, tmp_path / "out", tiny_windows(), lambda block: {}, config={"note": 1}, context=context)
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    assert after.tensors == before.tensors
    originals, copies = read_tensors(source, before.tensors), read_tensors(tmp_path / "out", after.tensors)
    assert all(torch.equal(originals[name], copies[name]) for name in originals)
    assert after.config == before.config | {"note": 1}
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert steps == [(0, 2), (1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("windows", "says"),
    [
        (torch.zeros(4, 8), "int64"),
        (torch.zeros(8, dtype=torch.int64), r"\[count, length\]"),
        (torch.zeros(0, 8, dtype=torch.int64), r"\[0, 8\]"),
        (torch.zeros(1, 129, dtype=torch.int64), "longer than the model"),
        (torch.full((1, 8), 320), "vocabulary of 320"),
    ],
)
def test_windows_that_fit_no_model_are_refused(checkpoint: Path, windows: torch.Tensor, says: str) -> None:
    with pytest.raises(UnusableData, match=says):
        next(walk(open_checkpoint(checkpoint), windows, context=Context()))


def test_a_quantized_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    from compression.quantization.gptq import quantize_gptq

    quantize_gptq(checkpoint, tmp_path / "q", tiny_windows(), group_size=32, context=Context())
    with pytest.raises(Incompatible, match="quantized already"):
        next(walk(open_checkpoint(tmp_path / "q"), tiny_windows(), context=Context()))
