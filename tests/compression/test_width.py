"""Width pruning against the original model with the same neurons and heads silenced, and against float64 formulas."""

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from compression.checkpoints.checkpoint import open_checkpoint
from compression.checkpoints.families import FAMILIES
from compression.checkpoints.loading import load_model
from compression.checkpoints.masks import read_masks, write_masks
from compression.context import Context
from compression.errors import Incompatible
from compression.pruning import WidthSettings, prune_width
from compression.pruning.criteria import activation_scores, taylor_scores, unit_norms
from compression.pruning.structure import pruned_heads, pruned_width, width_config
from compression.pruning.units import strongest
from compression.quantization.gptq import quantize_gptq
from compression.quantization.settings import GPTQSettings
from tests.tiny import tiny_checkpoint, tiny_windows

EVERY_FAMILY = pytest.mark.parametrize("family", sorted(FAMILIES))
DOWN, OUT = "mlp.down_proj", "self_attn.o_proj"
UNITS = {DOWN: 128, OUT: 4}


def opened(path: Path) -> PreTrainedModel:
    """In plain transformers, every tensor in its place."""
    model, found = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny_windows()).logits


def kept_of(out: Path, layer: int, path: str, count: int, total: int) -> torch.Tensor:
    """The kept indices of a layer, checked for form; as a mask of all."""
    indices = load_file(out / "kept.safetensors")[f"model.layers.{layer}.{path}"]
    assert indices.dtype == torch.int32
    assert indices.tolist() == sorted(set(indices.tolist()))
    assert len(indices) == count
    return torch.zeros(total, dtype=torch.bool).scatter(0, indices.long(), True)


@pytest.mark.parametrize("n", [1, 2])
def test_norms_are_the_papers(n: int) -> None:
    generator = torch.Generator().manual_seed(0)
    gate, up, down = (torch.randn(*shape, generator=generator) for shape in ((6 * n, 4), (6, 4), (4, 6 * n)))
    for j, norm in enumerate(unit_norms([gate, up], down, 6)):
        rows = slice(j * n, (j + 1) * n)
        weights = [*gate[rows].flatten().tolist(), *up[j].tolist(), *down[:, rows].flatten().tolist()]
        assert float(norm) == pytest.approx(sum(w * w for w in weights) ** 0.5, rel=1e-12)


def test_of_equal_neurons_the_first_stay() -> None:
    assert strongest(torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0]), 2).tolist() == [1, 2]


@pytest.mark.parametrize("mlp_bias", [False, True])
@pytest.mark.parametrize("tied", [True, False])
def test_the_pruned_model_is_the_original_with_neurons_silenced(tmp_path: Path, mlp_bias: bool, tied: bool) -> None:
    source = tiny_checkpoint(tmp_path / "in", mlp_bias=mlp_bias, tied=tied)
    warnings: list[str] = []
    metrics = prune_width(source, tmp_path / "out", WidthSettings(keep=0.6), context=Context(warn=warnings.append))
    assert metrics["kept_ratio"] == 0.5  # 76.8 of 128 neurons, the nearest multiple of 32 is 64
    assert metrics["kept_heads_ratio"] == 1
    assert metrics["intermediate_size"] == 64
    assert "256 avoids that" in warnings[0]
    silenced = load_model(source)
    for layer in range(2):
        stays = kept_of(tmp_path / "out", layer, DOWN, 64, 128)
        silenced.get_submodule(f"model.layers.{layer}.{DOWN}").weight.data[:, ~stays] = 0
    pruned = opened(tmp_path / "out")
    torch.testing.assert_close(logits(pruned), logits(silenced), rtol=1e-4, atol=1e-4)
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    assert after.config == before.config | {"intermediate_size": 64}
    assert metrics["parameters_ratio"] == pytest.approx(
        sum(p.numel() for p in pruned.parameters()) / sum(p.numel() for p in silenced.parameters()), rel=1e-9
    )


@EVERY_FAMILY
@pytest.mark.parametrize("heads", ["groups", "queries"])
def test_every_family_is_the_original_with_neurons_and_heads_silenced(tmp_path: Path, family: str, heads: Any) -> None:
    # OLMo 2 norms queries and keys over all heads: an eps that counts would differ, the rest is undone below.
    source = tiny_checkpoint(tmp_path / "in", family, heads=8, kv_heads=4, rms_norm_eps=1e-12)
    before = load_model(source)
    metrics = prune_width(source, tmp_path / "out", WidthSettings(keep=0.5, keep_heads=0.5, heads=heads), context=Context())
    assert (metrics["kept_ratio"], metrics["kept_heads_ratio"]) == (0.5, 0.5)
    for layer, block in enumerate(before.model.layers):
        neurons = kept_of(tmp_path / "out", layer, DOWN, 64, 128)
        queries = kept_of(tmp_path / "out", layer, OUT, 4, 8)
        pairs = queries.view(4, 2)
        assert pairs.all(1).sum() == 2 if heads == "groups" else (pairs.sum(1) == 1).all()
        channels, of_pairs = queries.repeat_interleave(8), pairs.any(1).repeat_interleave(8)
        block.mlp.down_proj.weight.data[:, ~neurons] = 0
        attention = block.self_attn
        attention.o_proj.weight.data[:, ~channels] = 0
        if family == "olmo2":
            for projection, norm, stays in ((attention.q_proj, attention.q_norm, channels), (attention.k_proj, attention.k_norm, of_pairs)):
                projection.weight.data[~stays] = 0
                norm.weight.data *= stays.double().mean().sqrt()  # the mean square is taken over fewer channels then
    torch.testing.assert_close(logits(opened(tmp_path / "out")), logits(before), rtol=1e-3, atol=1e-3)
    changed = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2 if heads == "groups" else 4, "head_dim": 8}
    assert open_checkpoint(tmp_path / "out").config == open_checkpoint(source).config | changed


def test_biases_of_heads_leave_with_them(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "in", attention_bias=True)
    model = load_model(source)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(source)
    prune_width(source, tmp_path / "out", WidthSettings(keep_heads=0.5), context=Context())
    for layer in range(2):
        stays = kept_of(tmp_path / "out", layer, OUT, 2, 4).repeat_interleave(16)
        model.get_submodule(f"model.layers.{layer}.{OUT}").weight.data[:, ~stays] = 0
    torch.testing.assert_close(logits(opened(tmp_path / "out")), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_l2_takes_the_heads_with_the_largest_weights(tmp_path: Path, family: str) -> None:
    source = tiny_checkpoint(tmp_path / "in", family)
    attention = [block.self_attn for block in load_model(source).model.layers]
    prune_width(source, tmp_path / "groups", WidthSettings(keep_heads=0.5), context=Context())
    prune_width(source, tmp_path / "queries", WidthSettings(keep_heads=0.5, heads="queries"), context=Context())
    for layer, part in enumerate(attention):
        q, k, v = (
            part.qkv_proj.weight if family == "phi3" else torch.cat([p.weight for p in (part.q_proj, part.k_proj, part.v_proj)])
        ).split([64, 32, 32])
        of_queries = [
            float(q[h * 16 : h * 16 + 16].norm() ** 2 + part.o_proj.weight[:, h * 16 : h * 16 + 16].norm() ** 2) for h in range(4)
        ]
        of_pairs = [float(k[g * 16 : g * 16 + 16].norm() ** 2 + v[g * 16 : g * 16 + 16].norm() ** 2) for g in range(2)]
        group = max(range(2), key=lambda g: of_pairs[g] + of_queries[2 * g] + of_queries[2 * g + 1])
        assert kept_of(tmp_path / "groups", layer, OUT, 2, 4).nonzero().flatten().tolist() == [2 * group, 2 * group + 1]
        singles = [max((2 * g, 2 * g + 1), key=lambda h: of_queries[h]) for g in range(2)]
        assert kept_of(tmp_path / "queries", layer, OUT, 2, 4).nonzero().flatten().tolist() == singles


def test_activation_is_what_a_unit_adds_to_the_output(checkpoint: Path) -> None:
    windows = tiny_windows()
    scores = activation_scores(open_checkpoint(checkpoint), windows, UNITS, context=Context())
    model = load_model(checkpoint)
    seen: dict[str, torch.Tensor] = {}
    for path in scores:
        model.get_submodule(path).register_forward_pre_hook(lambda _, x, path=path: seen.update({path: x[0].double().flatten(0, 1)}))
    logits(model)
    for path, score in scores.items():
        weight = model.get_submodule(path).weight.double()
        contributions = seen[path][:, None] * weight  # [tokens, hidden, channels]
        expected = contributions.square().sum(1).mean(0).view(len(score), -1).sum(1).sqrt()
        torch.testing.assert_close(score, expected.detach(), rtol=1e-5, atol=0)


def window_loss(model: PreTrainedModel, window: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(window[None]).logits[0, :-1], window[1:])


def test_taylor_is_the_gradient_of_gates_and_of_weights(checkpoint: Path) -> None:
    """Against finite differences of the loss by gates, and against Σ w·∂L/∂w of the weights. Norms stay float32 inside, hence the large step."""
    windows = tiny_windows(3, 16)
    scores = taylor_scores(open_checkpoint(checkpoint), windows, UNITS, context=Context())
    model = load_model(checkpoint, dtype=torch.float64)
    for path, score in scores.items():
        weight = model.get_submodule(path).weight
        products = [weight.detach() * torch.autograd.grad(window_loss(model, window), weight)[0] for window in windows]
        by_weights = torch.stack([product.sum(0).view(len(score), -1).sum(1).abs() for product in products]).mean(0)
        torch.testing.assert_close(score, by_weights, rtol=2e-3, atol=1e-6)
        size, step, original = weight.shape[1] // len(score), 1e-2, weight.detach().clone()
        for unit in range(min(len(score), 4)):
            columns, slopes = slice(unit * size, (unit + 1) * size), []
            for window in windows:
                losses = []
                for gate in (1 + step, 1 - step):
                    weight.data[:, columns] = gate * original[:, columns]
                    with torch.no_grad():
                        losses.append(float(window_loss(model, window)))
                weight.data[:, columns] = original[:, columns]
                slopes.append(abs(losses[0] - losses[1]) / (2 * step))
            assert float(score[unit]) == pytest.approx(sum(slopes) / len(slopes), rel=1e-2, abs=2e-5)


@pytest.mark.parametrize("criterion", ["activation", "taylor", "random"])
def test_every_criterion_prunes_and_repeats(tmp_path: Path, checkpoint: Path, criterion: Any) -> None:
    chosen = {}
    for name in ("first", "again"):
        prune_width(
            checkpoint,
            tmp_path / name,
            WidthSettings(keep=0.5, keep_heads=0.5, criterion=criterion),
            tiny_windows(),
            context=Context(seed=3),
        )
        chosen[name] = (tmp_path / name / "kept.safetensors").read_bytes()
    assert chosen["first"] == chosen["again"]
    assert opened(tmp_path / "first").model.layers[0].self_attn.k_proj.out_features == 16
    prune_width(checkpoint, tmp_path / "l2", WidthSettings(keep=0.5, keep_heads=0.5), context=Context(seed=3))
    assert (tmp_path / "l2" / "kept.safetensors").read_bytes() != chosen["first"]
    if criterion == "random":
        prune_width(checkpoint, tmp_path / "other", WidthSettings(keep=0.5, keep_heads=0.5, criterion=criterion), context=Context(seed=4))
        assert (tmp_path / "other" / "kept.safetensors").read_bytes() != chosen["first"]
    else:
        with pytest.raises(Incompatible, match="needs calibration windows"):
            prune_width(checkpoint, tmp_path / "none", WidthSettings(keep=0.5, criterion=criterion), context=Context())


def test_the_criteria_that_look_at_data_find_silent_neurons(tmp_path: Path) -> None:
    """Neurons that never fire, though their incoming weights are the largest: l2 keeps them, the others do not."""
    source = tiny_checkpoint(tmp_path / "in", mlp_bias=True)
    model = load_model(source)
    for block in model.model.layers:
        block.mlp.gate_proj.weight.data[:64] = 0
        block.mlp.up_proj.weight.data[:64] *= 10
    model.save_pretrained(source)
    for criterion, first_stay in (("l2", True), ("activation", False), ("taylor", False)):
        prune_width(source, tmp_path / criterion, WidthSettings(keep=0.5, criterion=criterion), tiny_windows(), context=Context())
        assert kept_of(tmp_path / criterion, 1, DOWN, 64, 128)[:64].all() == first_stay, criterion


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_sparse_checkpoint_stays_sparse(tmp_path: Path, family: str) -> None:
    source = tiny_checkpoint(tmp_path / "in", family)
    model = load_model(source)
    names = [f"model.layers.{i}.{path}.weight" for i in range(2) for path in FAMILIES[family].linears]
    masks = {name: model.get_parameter(name).detach().abs() > 0.1 for name in names}
    for name, mask in masks.items():
        model.get_parameter(name).data *= mask
    model.save_pretrained(source)
    write_masks(source, masks)
    prune_width(source, tmp_path / "out", WidthSettings(keep=0.5, keep_heads=0.5), context=Context())
    pruned, cut = opened(tmp_path / "out"), read_masks(tmp_path / "out")
    assert set(cut) == set(masks)
    for name, mask in cut.items():
        assert torch.equal(mask, pruned.get_parameter(name) != 0), name
    assert open_checkpoint(tmp_path / "out").sparse


def test_kept_indices_are_those_of_the_unpruned_model(tmp_path: Path, checkpoint: Path) -> None:
    prune_width(checkpoint, tmp_path / "a", WidthSettings(keep=0.75, keep_heads=0.5), context=Context())
    prune_width(tmp_path / "a", tmp_path / "b", WidthSettings(keep=0.5), context=Context())
    original = load_model(checkpoint).get_parameter("model.layers.1.mlp.up_proj.weight")
    pruned = opened(tmp_path / "b").get_parameter("model.layers.1.mlp.up_proj.weight")
    kept = load_file(tmp_path / "b" / "kept.safetensors")
    assert torch.equal(pruned, original[kept["model.layers.1.mlp.down_proj"].long()])
    assert torch.equal(
        kept["model.layers.1.self_attn.o_proj"], load_file(tmp_path / "a" / "kept.safetensors")["model.layers.1.self_attn.o_proj"]
    )


def test_widths_k_quants_take_give_no_warning(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "in", intermediate=512, layers=1)
    warnings: list[str] = []
    assert prune_width(source, tmp_path / "out", WidthSettings(keep=0.5), context=Context(warn=warnings.append))["kept_ratio"] == 0.5
    assert warnings == []
    prune_width(source, tmp_path / "heads", WidthSettings(keep_heads=0.5), context=Context(warn=warnings.append))
    assert len(warnings) == 1
    assert "attention is 32 wide" in warnings[0]


@given(st.integers(32, 20000), st.floats(0.001, 1.0), st.integers(1, 512))
def test_planned_widths(width: int, keep: float, multiple_of: int) -> None:
    if multiple_of > width:
        with pytest.raises(Incompatible):
            pruned_width(width, keep, multiple_of)
        return
    planned = pruned_width(width, keep, multiple_of)
    assert planned % multiple_of == 0
    assert multiple_of <= planned <= width
    reachable = range(multiple_of, width + 1, multiple_of)
    assert abs(planned - width * keep) <= min(abs(other - width * keep) for other in reachable) + 1e-6


@EVERY_FAMILY
def test_a_number_of_heads_is_planned_where_transformers_opens_it(tmp_path: Path, family: str) -> None:
    source = open_checkpoint(tiny_checkpoint(tmp_path / "in", family, layers=1, heads=8, kv_heads=4))
    config = source.config | {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8}
    try:
        AutoConfig.for_model(**config)
        opens = True
    except StrictDataclassClassValidationError as error:
        assert "multiple of the number of attention heads" in " ".join(str(error).split())
        opens = False
    if opens:
        assert pruned_heads(source, 0.75, "groups") == (6, 3)
    else:
        with pytest.raises(Incompatible, match=r"shares that work: 0\.25, 0\.5, 1") as refused:
            pruned_heads(source, 0.75, "groups")
        assert refused.value.key == "keep_heads"


def test_a_longrope_phi3_keeps_its_heads(tmp_path: Path) -> None:
    rotation = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "rope_theta": 1e4}
    source = open_checkpoint(tiny_checkpoint(tmp_path / "in", "phi3", rope_parameters=rotation, original_max_position_embeddings=64))
    with pytest.raises(Exception, match="short_factor field must have length 16"):  # transformers itself
        AutoConfig.for_model(**(source.config | {"num_attention_heads": 2, "num_key_value_heads": 1}))
    with pytest.raises(Incompatible, match="longrope"):
        pruned_heads(source, 0.5, "groups")


def test_all_neurons_stay_whatever_their_number(tmp_path: Path) -> None:
    source = open_checkpoint(tiny_checkpoint(tmp_path / "in", layers=1, intermediate=100))
    assert width_config(source, WidthSettings(keep_heads=0.5))["intermediate_size"] == 100


@pytest.mark.parametrize(
    ("parameters", "key"),
    [
        ({"keep": 0.5, "multiple_of": 256}, "multiple_of"),
        ({"keep": 0.5, "criterion": "taylor"}, "criterion"),
    ],
)
def test_unfitting_settings_are_refused(tmp_path: Path, checkpoint: Path, parameters: dict[str, Any], key: str) -> None:
    with pytest.raises(Incompatible) as refused:
        prune_width(checkpoint, tmp_path / "out", WidthSettings(**parameters), context=Context())
    assert refused.value.key == key
    assert not (tmp_path / "out").exists()


def test_query_heads_leave_only_where_they_share(tmp_path: Path) -> None:
    source = open_checkpoint(tiny_checkpoint(tmp_path / "in", kv_heads=4, layers=1))
    with pytest.raises(Incompatible, match="heads: groups") as refused:
        pruned_heads(source, 0.5, "queries")
    assert refused.value.key == "heads"
    assert pruned_heads(source, 0.5, "groups") == (2, 2)


def test_a_quantized_checkpoint_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    quantize_gptq(checkpoint, tmp_path / "q", GPTQSettings(group_size=32), tiny_windows(2), context=Context())
    with pytest.raises(Incompatible, match="takes a dense checkpoint"):
        prune_width(tmp_path / "q", tmp_path / "out", WidthSettings(keep=0.5), context=Context())
