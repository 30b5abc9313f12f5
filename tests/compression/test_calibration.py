"""The walk against transformers' own forward pass."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.llama.modeling_llama import LlamaMLP

import compression.checkpoints.families
from compression.calibration.calibration import BlockMethod, CompressedBlock, compress_blocks
from compression.calibration.walk import Block, fill_buffers, walk
from compression.checkpoints.checkpoint import file_digests, open_checkpoint
from compression.checkpoints.loading import load_model
from compression.checkpoints.shards import read_tensors
from compression.checkpoints.skeleton import skeleton
from compression.context import Context
from compression.errors import EdgepressError, Incompatible, UnusableData
from compression.pruning import UnstructuredSettings, prune_unstructured
from compression.quantization.gptq import quantize_gptq
from compression.quantization.settings import GPTQSettings
from tests.tiny import tiny_checkpoint, tiny_windows

FAMILIES = {
    **{family: {} for family in compression.checkpoints.families.FAMILIES},
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "mistral": {"sliding_window": 8},  # shorter than the windows, so that a wrong mask shows
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {},
    "gemma4_text": {  # blocks with buffers, each given what depends on the tokens
        "layer_types": ["sliding_attention", "full_attention", "full_attention"], "sliding_window": 8, "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": 320, "num_kv_shared_layers": 0, "global_head_dim": 16,
    },
}  # fmt: skip


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
    path = tiny_checkpoint(tmp_path / model_type, model_type, layers=3, **FAMILIES[model_type])
    windows = tiny_windows(count=5)
    monkeypatch.setattr("compression.calibration.walk.TOKENS_PER_BATCH", 64)  # batches of 2, 2 and 1 windows
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
                torch.testing.assert_close(shared.second_moment.double(), expected[seen[-1]], rtol=1e-4, atol=1e-5)
        for name, factor in change.items():
            if name.startswith(f"{block.name}."):
                block.linear(name.removeprefix(f"{block.name}.").removesuffix(".weight")).weight.mul_(factor)
    assert sorted(seen) == sorted(name for name in expected if ".layers." in name)


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
    compress_blocks(
        source, tmp_path / "out", tiny_windows(), BlockMethod(lambda block: CompressedBlock(), {}, {"note": 1}), context=context
    )
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    assert after.tensors == before.tensors
    originals, copies = read_tensors(source, before.tensors), read_tensors(tmp_path / "out", after.tensors)
    assert all(torch.equal(originals[name], copies[name]) for name in originals)
    assert after.config == before.config | {"note": 1}
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert steps[0] == (0, 14) and (7, 14) in steps and steps[-1] == (14, 14)


def checkpoint_with_buffers(path: Path, model_type: str) -> Path:
    """Blocks whose buffers hold what no constructor gives them."""
    more = {} if model_type == "apertus" else {**FAMILIES["gemma4_text"], "layer_types": ["sliding_attention", "full_attention"]}
    source = tiny_checkpoint(path, model_type, **more)
    tensors = load_file(source / "model.safetensors")
    for name in tensors:
        if name.endswith(("layer_scalar", "act_fn.beta")):
            tensors[name] = tensors[name] * 0.7
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


def divergence(one: Path, other: Path) -> float:
    """Mean KL of two checkpoints' next tokens."""
    p, q = (load_model(path)(tiny_windows(4, seed=5)).logits.detach().double().log_softmax(-1) for path in (one, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("model_type", ["gemma4_text", "apertus"])
def test_buffers_of_blocks_stay(tmp_path: Path, model_type: str) -> None:
    source = checkpoint_with_buffers(tmp_path / "in", model_type)
    for method in ("magnitude", "wanda", "sparsegpt"):
        prune_unstructured(source, tmp_path / method, UnstructuredSettings(method=method, sparsity=0.01), tiny_windows(), context=Context())  # type: ignore[arg-type]
        assert open_checkpoint(tmp_path / method).tensors == open_checkpoint(source).tensors
    quantize_gptq(source, tmp_path / "gptq", GPTQSettings(bits=8, group_size=32), tiny_windows(), context=Context())
    assert divergence(source, tmp_path / "sparsegpt") < 2 * divergence(source, tmp_path / "magnitude")
    assert max(divergence(source, tmp_path / method) for method in ("wanda", "gptq")) < 0.005
    stay = set(open_checkpoint(source).tensors) - set(open_checkpoint(source).linear_tensors())
    before, after = read_tensors(source, stay), read_tensors(tmp_path / "gptq", stay)
    assert [name for name in stay if not torch.equal(before[name], after[name])] == []


def test_buffers_that_no_checkpoint_holds_are_computed(tmp_path: Path) -> None:
    multipliers = [2.0, 3.0, 0.5, 1.5, 0.7]
    source = open_checkpoint(
        tiny_checkpoint(
            tmp_path / "in", "falcon_h1", mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16, mamba_n_groups=1,
            ssm_multipliers=multipliers,
        )
    )  # fmt: skip
    filled, loaded = skeleton(source), load_model(source.path)
    fill_buffers(filled, "cpu")
    for name, buffer in loaded.named_buffers():
        assert torch.equal(filled.get_buffer(name), buffer), name
    assert set(filled.get_buffer("model.layers.1.mamba.mup_vector").unique().tolist()) == {torch.tensor(m).item() for m in multipliers}


def test_a_layer_that_no_window_reaches_is_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaMLP, "forward", lambda mlp, x: mlp.down_proj(mlp.gate_proj(x)))
    with pytest.raises(Incompatible, match=r"no calibration window reaches model\.layers\.0\.mlp\.up_proj"):
        next(walk(open_checkpoint(checkpoint), tiny_windows(), context=Context()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_a_buffer_that_nothing_fills_is_refused(checkpoint: Path, dtype: torch.dtype) -> None:
    model = skeleton(open_checkpoint(checkpoint))
    model.get_submodule("model.layers.1.mlp").register_buffer("forgotten", torch.ones(3, dtype=dtype, device="meta"), persistent=False)
    with pytest.raises(Incompatible, match=r"model\.layers\.1\.mlp\.forgotten"):
        fill_buffers(model, "cpu")


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
    quantize_gptq(checkpoint, tmp_path / "q", GPTQSettings(group_size=32), tiny_windows(), context=Context())
    with pytest.raises(Incompatible, match="quantized already"):
        next(walk(open_checkpoint(tmp_path / "q"), tiny_windows(), context=Context()))


def scale_down(block: Block) -> CompressedBlock:
    """Halves what reads the input of the MLP, so that every block shows in those behind it."""
    for shared in block.each_input():
        if "mlp.up_proj" in shared.layers:
            block.linear("mlp.up_proj").weight.mul_(0.5 + float(shared.second_moment.diagonal().mean()) / 10)
    return CompressedBlock(counts={"seen": 1.0}, layers={"mlp.up_proj": {"index": float(block.index)}}, warnings=[f"block {block.index}"])


@pytest.mark.parametrize("spill", [False, True])
@pytest.mark.parametrize("dies_in", ["compress", "passing on"])
def test_a_killed_walk_goes_on_at_its_block_and_ends_in_the_same_bytes(
    tmp_path: Path, dies_in: str, spill: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compression.calibration.walk.TOKENS_PER_BATCH", 64)
    if spill:
        monkeypatch.setattr("compression.calibration.hidden_states.MEMORY_LIMIT", 20_000)
    source = tiny_checkpoint(tmp_path / "in", layers=4, dtype=torch.bfloat16)
    windows = tiny_windows(count=5)
    warned: list[str] = []
    undisturbed = compress_blocks(source, tmp_path / "whole", windows, BlockMethod(scale_down, {}), context=Context())

    def dying(block: Block) -> CompressedBlock:
        if block.index == 2 and dies_in == "compress":
            raise KeyboardInterrupt
        if block.index == 2:
            monkeypatch.setattr("compression.calibration.walk.Walk.passes", None)
        return scale_down(block)

    with monkeypatch.context() as patch:
        monkeypatch = patch
        with pytest.raises((KeyboardInterrupt, TypeError)):
            compress_blocks(source, tmp_path / "dead", windows, BlockMethod(dying, {}), work=tmp_path / "work", context=Context())
    seen: list[int] = []

    def watched(block: Block) -> CompressedBlock:
        seen.append(block.index)
        return scale_down(block)

    counts = compress_blocks(
        source, tmp_path / "resumed", windows, BlockMethod(watched, {}), work=tmp_path / "work", context=Context(warn=warned.append)
    )
    assert seen == [2, 3]
    assert counts == undisturbed == {"seen": 4.0}
    assert warned == [f"block {index}" for index in range(4)]
    assert file_digests(tmp_path / "resumed") == file_digests(tmp_path / "whole")


@pytest.mark.parametrize("other", ["windows", "settings", "config", "weights", "seed"])
def test_a_walk_does_not_go_on_from_another(tmp_path: Path, other: str) -> None:
    first = {"windows": tiny_windows(), "settings": {"method": "gptq", "mse": True}, "config": {"bits": 4}, "weights": 0, "seed": 0}
    changed = {
        "windows": tiny_windows(seed=1),
        "settings": {"method": "gptq", "mse": False},
        "config": {"bits": 8},
        "weights": 1,
        "seed": 1,
    }
    for number, given in enumerate(({}, {other: changed[other]})):
        now: dict[str, Any] = first | given
        source = tiny_checkpoint(tmp_path / f"in-{number}", seed=now["weights"])
        with contextlib.nullcontext() if number == 0 else pytest.raises(EdgepressError, match="another method, on another model"):
            compress_blocks(
                source, tmp_path / f"out-{number}", now["windows"], BlockMethod(lambda block: CompressedBlock(), now["settings"], now["config"]),
                work=tmp_path / "work", context=Context(seed=now["seed"]),
            )  # fmt: skip


def test_work_of_an_older_edgepress_begins_anew(tmp_path: Path, checkpoint: Path) -> None:
    def walk_over() -> list[int]:
        seen: list[int] = []
        compress_blocks(
            checkpoint, tmp_path / "out", tiny_windows(), BlockMethod(lambda block: seen.append(block.index) or CompressedBlock(), {}),
            work=tmp_path / "work", context=Context(warn=warned.append),
        )  # fmt: skip
        return seen

    warned: list[str] = []
    assert walk_over() == [0, 1] and walk_over() == []
    for marker in (tmp_path / "work" / "walk").glob("*/complete.json"):
        marker.write_text(json.dumps(json.loads(marker.read_text()) | {"run": "0" * 64}))
    assert walk_over() == [0, 1] and len(warned) == 2


def test_statistics_of_activations(checkpoint: Path) -> None:
    windows = tiny_windows()
    inputs: dict[str, torch.Tensor] = {}
    model = load_model(checkpoint)
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda _, arguments, name=name: inputs.update({name: arguments[0]}) if arguments else None)
    with torch.no_grad():
        model(windows)
    collect = frozenset({"mean_square", "absmax"})
    block = next(walk(open_checkpoint(checkpoint), windows, collect=collect, context=Context()))
    for shared in block.inputs:
        x = inputs[f"{block.name}.{shared.layers[0]}"].double().flatten(0, 1)
        assert shared.hessian is None
        torch.testing.assert_close(shared.mean_square.double(), x.square().mean(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(shared.absmax.double(), x.abs().amax(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model_type", ["opt", "gpt_neox", "stablelm"])
def test_an_unlisted_decoder_of_linear_layers(tmp_path: Path, model_type: str) -> None:
    more = {"ffn_dim": 128, "word_embed_proj_dim": 64} if model_type == "opt" else {}
    source = open_checkpoint(tiny_checkpoint(tmp_path / "in", model_type, tied=model_type == "opt", **more))
    expected = second_moments(source.path, tiny_windows())
    found = {
        f"{b.name}.{path}": s.second_moment for b in walk(source, tiny_windows(), context=Context()) for s in b.inputs for path in s.layers
    }
    assert found.keys() == {name for name in expected if name.startswith(source.blocks)}
    assert source.linear_widths().keys() == {name.removeprefix(f"{source.blocks}.0.") for name in found if ".0." in name}


def test_a_decoder_of_other_layers_is_refused(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "in", "mixtral")  # experts in one tensor, chosen by a router
    with pytest.raises(Incompatible, match="mlp.experts.gate_up_proj"):
        next(walk(open_checkpoint(source), tiny_windows(), context=Context()))
