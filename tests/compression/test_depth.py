"""Depth pruning against the original model with the same blocks skipped, and against float64 formulas."""

import json
import math
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from compression.checkpoints.checkpoint import open_checkpoint
from compression.checkpoints.families import FAMILIES
from compression.checkpoints.loading import load_model
from compression.checkpoints.masks import read_masks, write_masks
from compression.checkpoints.normalization import normalize
from compression.context import Context
from compression.errors import Incompatible, UnusableModel
from compression.pruning import DepthSettings, WidthSettings, prune_depth, prune_width
from compression.pruning.depth import block_influence, redundant_blocks
from compression.pruning.structure import blocks_left, depth_config
from compression.quantization.gptq import quantize_gptq
from compression.quantization.settings import GPTQSettings
from tests.tiny import tiny_checkpoint, tiny_windows


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five blocks, of which number 1 and 3 do little."""
    source = tiny_checkpoint(tmp_path_factory.mktemp("deep") / "llama", layers=5)
    model = load_model(source)
    for block, share in ((1, 0.05), (3, 0.1)):
        layer = model.model.layers[block]
        layer.self_attn.o_proj.weight.data *= share
        layer.mlp.down_proj.weight.data *= share
    model.save_pretrained(source)
    return source


def opened(path: Path) -> PreTrainedModel:
    """In plain transformers, every tensor in its place."""
    model, found = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def logits(model: PreTrainedModel, windows: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny_windows() if windows is None else windows, use_cache=False).logits


def without(model: PreTrainedModel, blocks: tuple[int, ...]) -> PreTrainedModel:
    """The model with blocks that return what they get, each still in its place."""
    for block in blocks:
        model.model.layers[block].register_forward_hook(lambda _, arguments, __: arguments[0])
    return model


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_the_original_with_blocks_skipped(tmp_path: Path, family: str) -> None:
    # Blocks differ where a family lets them: windows of 8 tokens, rotation or none.
    differing: dict[str, dict[str, Any]] = {
        "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
        "qwen3": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
        "smollm3": {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 8},
        "gemma3_text": {"sliding_window": 8, "sliding_window_pattern": 2},
    }
    old = tiny_checkpoint(tmp_path / "in", family, layers=5, **differing.get(family, {}))
    # Older configs leave the lists to transformers' rule; they are the same model.
    written = json.loads((old / "config.json").read_text())
    for name in ("layer_types", "no_rope_layers"):
        written.pop(name, None)
    written |= differing.get(family, {})
    (old / "config.json").write_text(json.dumps(written))
    source = tmp_path / "normal"
    normalize(old, source)
    metrics = prune_depth(source, tmp_path / "out", DepthSettings(blocks=(0, 3)), context=Context())
    assert (metrics["kept_ratio"], metrics["num_hidden_layers"]) == (0.6, 3)
    pruned, original = opened(tmp_path / "out"), load_model(source)
    if family in differing:
        assert len(set(original.config.layer_types)) == 2
        assert pruned.config.layer_types == [original.config.layer_types[block] for block in (1, 2, 4)]
    torch.testing.assert_close(logits(pruned), logits(without(original, (0, 3))), rtol=1e-4, atol=1e-4)
    kept = load_file(tmp_path / "out" / "kept.safetensors")["model.layers"]
    assert kept.dtype == torch.int32
    assert kept.tolist() == [1, 2, 4]
    sizes = [sum(p.numel() for p in model.parameters()) for model in (pruned, original)]
    assert metrics["parameters_ratio"] == pytest.approx(sizes[0] / sizes[1], rel=1e-9)


def test_influence_is_the_papers(deep: Path) -> None:
    states: list[torch.Tensor] = []
    model = load_model(deep, dtype=torch.float64)
    with torch.no_grad():
        model.model.layers[-1].register_forward_hook(lambda _, __, output: states.append(output))  # hidden_states ends behind the norm
        states[:0] = model(tiny_windows(), output_hidden_states=True).hidden_states[:-1]
    expected = []
    for before, after in pairwise(states):
        cosines = [float(x @ y / (x.norm() * y.norm())) for x, y in zip(before.flatten(0, 1), after.flatten(0, 1), strict=True)]
        expected.append(1 - sum(cosines) / len(cosines))
    influence = block_influence(open_checkpoint(deep), tiny_windows(), context=Context())
    assert influence.tolist() == pytest.approx(expected, rel=1e-4)


def test_the_least_influential_blocks_leave(tmp_path: Path, deep: Path) -> None:
    told: dict[int, float] = {}
    prune_depth(
        deep,
        tmp_path / "out",
        DepthSettings(drop=2),
        tiny_windows(),
        context=Context(metrics=lambda values, step: told.update({step: values["block_influence"]})),
    )
    assert load_file(tmp_path / "out" / "kept.safetensors")["model.layers"].tolist() == [0, 2, 4]
    assert sorted(told, key=lambda block: told[block])[:2] == [1, 3]
    torch.testing.assert_close(logits(opened(tmp_path / "out")), logits(without(load_model(deep), (1, 3))), rtol=1e-4, atol=1e-4)


def perplexity(model: PreTrainedModel, windows: torch.Tensor) -> float:
    log_probabilities = logits(model, windows).double().log_softmax(-1)[:, :-1]
    return math.exp(-log_probabilities.gather(-1, windows[:, 1:, None]).mean())


def test_perplexity_removes_the_best_block_round_by_round(tmp_path: Path) -> None:
    source, windows, told = tiny_checkpoint(tmp_path / "in", layers=4, seed=5), tiny_windows(40, 48), []
    gone = redundant_blocks(open_checkpoint(source), windows, 2, context=Context(metrics=lambda values, step: told.append((step, values))))
    first = min(range(4), key=lambda block: perplexity(without(load_model(source), (block,)), windows))
    second = min(set(range(4)) - {first}, key=lambda block: perplexity(without(load_model(source), (first, block)), windows))
    assert gone == [first, second]
    assert [step for step, _ in told] == [1, 2]
    assert told[1][1]["calibration_perplexity"] == pytest.approx(
        perplexity(without(load_model(source), (first, second)), windows), rel=1e-5
    )
    prune_depth(source, tmp_path / "out", DepthSettings(keep=0.5, criterion="perplexity"), windows, context=Context())
    assert perplexity(opened(tmp_path / "out"), windows) == pytest.approx(told[1][1]["calibration_perplexity"], rel=1e-5)
    everyone = [perplexity(without(load_model(source), pair), windows) for pair in combinations(range(4), 2)]
    assert min(everyone) <= told[1][1]["calibration_perplexity"] * (1 + 1e-5) < max(everyone)


def test_masks_and_kept_neurons_follow_their_blocks(tmp_path: Path, deep: Path) -> None:
    prune_width(deep, tmp_path / "narrow", WidthSettings(keep=0.5, keep_heads=0.5), context=Context())
    model = load_model(tmp_path / "narrow")
    names = [f"model.layers.{i}.{path}.weight" for i in range(5) for path in FAMILIES["llama"].linears]
    masks = {name: model.get_parameter(name).detach().abs() > 0.05 for name in names}
    for name, mask in masks.items():
        model.get_parameter(name).data *= mask
    model.save_pretrained(tmp_path / "narrow")
    write_masks(tmp_path / "narrow", masks)
    prune_depth(tmp_path / "narrow", tmp_path / "once", DepthSettings(blocks=(0,)), context=Context())
    prune_depth(tmp_path / "once", tmp_path / "out", DepthSettings(blocks=(1,)), context=Context())
    pruned, cut = opened(tmp_path / "out"), read_masks(tmp_path / "out")
    assert len(cut) == 3 * 7
    for name, mask in cut.items():
        assert torch.equal(mask, pruned.get_parameter(name) != 0), name
    kept, narrow = load_file(tmp_path / "out" / "kept.safetensors"), load_file(tmp_path / "narrow" / "kept.safetensors")
    assert kept["model.layers"].tolist() == [1, 3, 4]
    assert len(kept) == 1 + 3 * 2
    original = load_model(deep)
    for index, block in enumerate(kept["model.layers"].tolist()):
        for path in ("mlp.down_proj", "self_attn.o_proj"):
            assert torch.equal(kept[f"model.layers.{index}.{path}"], narrow[f"model.layers.{block}.{path}"])
        name = f"model.layers.{index}.mlp.up_proj"
        rows = original.get_parameter(f"model.layers.{block}.mlp.up_proj.weight")[kept[f"model.layers.{index}.mlp.down_proj"].long()]
        assert torch.equal(pruned.get_parameter(f"{name}.weight"), rows * cut[f"{name}.weight"])


def test_shards_are_read_and_written(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "in", layers=3)
    model = load_model(source)
    (source / "model.safetensors").unlink()
    model.save_pretrained(source, max_shard_size="100KB")
    assert len(list(source.glob("model-*.safetensors"))) > 1
    prune_depth(source, tmp_path / "out", DepthSettings(blocks=(1,)), context=Context())
    torch.testing.assert_close(logits(opened(tmp_path / "out")), logits(without(model, (1,))), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("parameters", "key"),
    [
        ({}, "drop"), ({"drop": 1, "keep": 0.5}, "drop"), ({"drop": 2}, "drop"), ({"blocks": ()}, "blocks"), ({"blocks": (0, 1)}, "blocks"),
        ({"blocks": (2,)}, "blocks"), ({"blocks": (-1,)}, "blocks"), ({"blocks": (0, 0)}, "blocks"), ({"drop": 1}, "criterion"),
    ],
)  # fmt: skip
def test_unfitting_settings_are_refused(tmp_path: Path, checkpoint: Path, parameters: dict[str, Any], key: str) -> None:
    with pytest.raises(Incompatible) as refused:
        prune_depth(checkpoint, tmp_path / "out", DepthSettings(**parameters), context=Context())
    assert refused.value.key == key
    assert not (tmp_path / "out").exists()


def test_a_share_is_rounded_and_leaves_a_block(deep: Path) -> None:
    source = open_checkpoint(deep)
    assert [blocks_left(source, DepthSettings(keep=share)) for share in (0.01, 0.5, 0.49, 0.9, 1.0)] == [1, 3, 2, 5, 5]
    assert blocks_left(source, DepthSettings(drop=4)) == 1
    assert blocks_left(source, DepthSettings(blocks=(1, 3))) == 3


def test_an_unlisted_family_is_refused(tmp_path: Path) -> None:
    source = open_checkpoint(tiny_checkpoint(tmp_path / "in", "granite"))
    with pytest.raises(UnusableModel, match="granite"):
        depth_config(source, [0])


def test_a_quantized_checkpoint_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    quantize_gptq(checkpoint, tmp_path / "q", GPTQSettings(group_size=32), tiny_windows(2), context=Context())
    with pytest.raises(Incompatible, match="takes a dense checkpoint"):
        prune_depth(tmp_path / "q", tmp_path / "out", DepthSettings(blocks=(0,)), context=Context())
