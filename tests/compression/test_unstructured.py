"""Unstructured pruning: the choice of weights against plain formulas in float64, and what whole checkpoints become."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from compression.checkpoints.checkpoint import open_checkpoint
from compression.checkpoints.families import FAMILIES
from compression.checkpoints.loading import load_model, save_model
from compression.checkpoints.masks import read_masks
from compression.checkpoints.shards import read_tensors
from compression.context import Context
from compression.errors import Incompatible, UnusableData, UnusableModel
from compression.pruning import UnstructuredSettings, prune_unstructured
from compression.pruning.allocation import allocate, outlier_ratio
from compression.pruning.gradient import WINDOWS_PER_BATCH, gradient_scores
from compression.pruning.selection import PRUNED, keep_n_of_m, keep_strongest, keep_strongest_overall
from compression.pruning.sparsegpt import sparsegpt
from tasks.kinds.prune_unstructured import PruneUnstructured
from tests.tiny import tiny_checkpoint, tiny_windows

METHODS = ("magnitude", "gradient", "wanda", "sparsegpt")
few_values = st.sampled_from([PRUNED, 0.0, 1e-30, 0.5, 0.5000001, 1.0, 3.0, 1e30])  # many ties


def lowest(values: list[float], count: int) -> list[bool]:
    """Keep all but the `count` lowest; of equal ones the first go."""
    gone = set(sorted(range(len(values)), key=values.__getitem__)[:count])
    return [index not in gone for index in range(len(values))]


@given(st.lists(st.lists(few_values, min_size=12, max_size=12), min_size=1, max_size=4), st.floats(0, 1))
def test_the_strongest_of_each_row_stay(rows: list[list[float]], sparsity: float) -> None:
    keep = keep_strongest(torch.tensor(rows), sparsity)
    assert keep.tolist() == [lowest(torch.tensor(row).tolist(), round(sparsity * 12)) for row in rows]


@given(st.lists(st.lists(few_values, min_size=16, max_size=16), min_size=1, max_size=4), st.sampled_from([(2, 4), (4, 8)]))
def test_n_of_each_m_neighbours_stay(rows: list[list[float]], group: tuple[int, int]) -> None:
    n, m = group
    for row, kept in zip(rows, keep_n_of_m(torch.tensor(rows), n, m).tolist(), strict=True):
        for start in range(0, 16, m):
            assert kept[start : start + m] == lowest(torch.tensor(row[start : start + m]).tolist(), m - n)


@given(st.lists(st.lists(few_values | st.floats(0, 10, width=32), min_size=6, max_size=6), min_size=1, max_size=5), st.floats(0, 1))
def test_the_strongest_of_all_layers_stay(layers: list[list[float]], sparsity: float) -> None:
    tensors = {str(index): torch.tensor(values).view(2, 3) for index, values in enumerate(layers)}
    keep = dict(keep_strongest_overall({name: lambda tensor=tensor: tensor for name, tensor in tensors.items()}, sparsity))
    everything = torch.cat([tensor.flatten() for tensor in tensors.values()]).tolist()
    assert torch.cat([mask.flatten() for mask in keep.values()]).tolist() == lowest(everything, round(sparsity * len(everything)))


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 1000)), min_size=1, max_size=8), st.floats(0.01, 0.99))
def test_sparsities_of_blocks_keep_the_average_and_follow_the_outliers(blocks: list[tuple[float, int]], sparsity: float) -> None:
    ratios = {str(index): ratio for index, (ratio, _) in enumerate(blocks)}
    weights = {str(index): count for index, (_, count) in enumerate(blocks)}
    given_out = allocate(ratios, weights, sparsity)
    assert sum(given_out[b] * weights[b] for b in ratios) / sum(weights.values()) == pytest.approx(sparsity)
    assert max(given_out.values()) - min(given_out.values()) <= 0.16 + 1e-9
    assert all(-1e-9 <= value <= 1 + 1e-9 for value in given_out.values())
    for one, other in zip(sorted(ratios, key=ratios.__getitem__), sorted(ratios, key=ratios.__getitem__)[1:], strict=False):
        assert given_out[one] >= given_out[other] - 1e-9


def test_outliers_are_counted_layer_by_layer() -> None:
    assert outlier_ratio([torch.tensor([1.0] * 19 + [100.0]), torch.tensor([1e4] * 20)]) == 1 / 40


def test_gradient_scores_are_those_of_autograd_in_float64(checkpoint: Path) -> None:
    windows = tiny_windows(count=WINDOWS_PER_BATCH + 3, length=16)
    names = [name for name in open_checkpoint(checkpoint).linear_tensors() if "layers.1" in name]
    scores = gradient_scores(load_model(checkpoint), names, windows, context=Context())
    judge = load_model(checkpoint).double()
    expected = {name: torch.zeros_like(judge.get_parameter(name)) for name in names}
    for batch in (windows[:WINDOWS_PER_BATCH], windows[WINDOWS_PER_BATCH:]):
        logits = judge(batch).logits[:, :-1]
        loss = -logits.log_softmax(-1).gather(-1, batch[:, 1:, None]).mean()
        for name, gradient in zip(names, torch.autograd.grad(loss, [judge.get_parameter(name) for name in names]), strict=True):
            expected[name] += (gradient * judge.get_parameter(name)).detach().abs() / 2
    assert scores.keys() == expected.keys()
    for name in names:
        torch.testing.assert_close(scores[name].double(), expected[name], rtol=1e-3, atol=1e-8)


def prune(checkpoint: Path, out: Path, *, warnings: list[str] | None = None, **settings: Any) -> dict[str, float]:
    context = Context(warn=[].append if warnings is None else warnings.append)
    windows, work = settings.pop("windows", tiny_windows()), settings.pop("work", None)
    return prune_unstructured(checkpoint, out, UnstructuredSettings(**settings), windows, work=work, context=context)


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return read_tensors(path, open_checkpoint(path).linear_tensors())


@pytest.mark.parametrize(
    "settings",
    [
        *({"method": method, "sparsity": 0.6} for method in METHODS),
        *({"method": method, "sparsity": 0.5, "pattern": pattern} for method in METHODS for pattern in ("2:4", "4:8")),
        *({"method": method, "sparsity": 0.4, "scope": "global"} for method in METHODS[:2]),
        *({"method": method, "sparsity": 0.5, "allocation": "sensitivity"} for method in METHODS),
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_what_is_written(tmp_path: Path, checkpoint: Path, settings: dict[str, Any]) -> None:
    metrics = prune(checkpoint, tmp_path / "out", **settings)
    before, after, masks = weights_of(checkpoint), weights_of(tmp_path / "out"), read_masks(tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").sparse
    assert masks.keys() == after.keys()
    assert all(torch.equal(after[name] != 0, masks[name]) for name in after)
    zeros = sum(int((weight == 0).sum()) for weight in after.values()) / sum(weight.numel() for weight in after.values())
    assert metrics == {"sparsity": pytest.approx(zeros), "fallback_layers": 0.0}
    assert zeros == pytest.approx(settings["sparsity"], abs=0.01)
    if "scope" not in settings and "allocation" not in settings:
        assert all(float((weight == 0).float().mean()) == pytest.approx(settings["sparsity"], abs=0.01) for weight in after.values())
    if "pattern" in settings:
        m = int(settings["pattern"][-1])
        assert all(((weight.view(-1, m) == 0).sum(1) == m // 2).all() for weight in after.values())
    if settings["method"] != "sparsegpt":
        assert all(torch.equal(after[name], before[name] * masks[name]) for name in after)
    others = [name for name in open_checkpoint(checkpoint).tensors if name not in after]
    assert set(open_checkpoint(tmp_path / "out").tensors) == set(open_checkpoint(checkpoint).tensors)
    old, new = read_tensors(checkpoint, others), read_tensors(tmp_path / "out", others)
    assert all(torch.equal(old[name], new[name]) for name in others)
    model, found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert torch.isfinite(model(tiny_windows()).logits).all()


def test_magnitude_within_a_layer_and_over_all(tmp_path: Path, checkpoint: Path) -> None:
    before = weights_of(checkpoint)
    prune(checkpoint, tmp_path / "layer", method="magnitude", sparsity=0.3, windows=None)
    for name, weight in weights_of(tmp_path / "layer").items():
        limit = before[name].abs().flatten().sort().values[round(0.3 * weight.numel())]
        assert torch.equal(weight, before[name] * (before[name].abs() >= limit))
    prune(checkpoint, tmp_path / "global", method="magnitude", sparsity=0.3, scope="global", windows=None)
    everything = torch.cat([weight.abs().flatten() for weight in before.values()]).sort().values
    limit = everything[round(0.3 * len(everything))]
    for name, weight in weights_of(tmp_path / "global").items():
        assert torch.equal(weight, before[name] * (before[name].abs() >= limit))


def test_wanda_takes_the_inputs_behind_the_pruned_layers_before(tmp_path: Path, checkpoint: Path) -> None:
    """Judge: transformers' own hidden states in float64 in a model whose first block is pruned already."""
    windows = tiny_windows()
    prune(checkpoint, tmp_path / "out", method="wanda", sparsity=0.5)
    pruned, before = load_model(tmp_path / "out").double(), weights_of(checkpoint)
    seen: dict[str, torch.Tensor] = {}
    judge = load_model(checkpoint).double()
    judge.model.layers[0].load_state_dict(pruned.model.layers[0].state_dict())
    for model, index in ((load_model(checkpoint).double(), 0), (judge, 1)):
        for path in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
            name = f"model.layers.{index}.{path}"
            model.get_submodule(name).register_forward_pre_hook(lambda _, given, name=name: seen.__setitem__(name, given[0]))
        with torch.no_grad():
            model(windows)
    for name, x in seen.items():
        scores = before[f"{name}.weight"].double().abs() * x.square().sum((0, 1)).sqrt()
        expected = torch.ones_like(scores, dtype=torch.bool).scatter_(1, scores.argsort(1)[:, : scores.shape[1] // 2], False)
        mask = read_masks(tmp_path / "out")[f"{name}.weight"]
        assert int((mask != expected).sum()) <= 2  # of thousands: near-ties that float32 orders otherwise


def test_the_model_is_nearest_to_itself_by_sparsegpt(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "in", hidden=256, intermediate=256)
    windows, errors = tiny_windows(count=64), {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        prune(source, tmp_path / method, method=method, sparsity=0.5, windows=windows)
        with torch.no_grad():
            errors[method] = float((load_model(tmp_path / method)(windows).logits - load_model(source)(windows).logits).square().mean())
    assert errors["sparsegpt"] < errors["wanda"]
    assert errors["sparsegpt"] < errors["magnitude"]
    report = json.loads((tmp_path / "sparsegpt" / "layers.json").read_text())
    assert len(report) == 14
    assert all(0 < layer["relative_error"] < 0.5 and layer["sparsity"] == 0.5 for layer in report.values())


@pytest.mark.parametrize("method", METHODS)
def test_what_is_pruned_already_stays_pruned(tmp_path: Path, checkpoint: Path, method: str) -> None:
    prune(checkpoint, tmp_path / "once", method="magnitude", sparsity=0.3)
    assert prune(tmp_path / "once", tmp_path / "twice", method=method, sparsity=0.6)["sparsity"] == pytest.approx(0.6, abs=0.01)
    first, second = read_masks(tmp_path / "once"), read_masks(tmp_path / "twice")
    assert not any((second[name] & ~first[name]).any() for name in first)
    less = prune(tmp_path / "once", tmp_path / "less", method=method, sparsity=0.1)
    assert less["sparsity"] >= 0.3 - 1e-3
    assert not any((read_masks(tmp_path / "less")[name] & ~first[name]).any() for name in first)


@pytest.mark.parametrize("method", METHODS[1:])
def test_what_is_pruned_already_goes_before_what_is_worth_nothing(tmp_path: Path, checkpoint: Path, method: str) -> None:
    """Half of the inputs are always zero, so most scores tie at zero; taking other ones than those pruned would prune more than asked."""
    model = load_model(checkpoint)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[:32] = 0
    save_model(model, tmp_path / "in", like=checkpoint)
    prune(tmp_path / "in", tmp_path / "once", method="magnitude", sparsity=0.3)
    prune(tmp_path / "once", tmp_path / "twice", method=method, sparsity=0.6)
    mask = read_masks(tmp_path / "twice")["model.layers.0.self_attn.q_proj.weight"]
    # Wanda prunes rows, each to its own count: a row that lost more than 60% to magnitude stays there
    assert float((~mask).float().mean()) == pytest.approx(0.6, abs=0.01)


@pytest.mark.parametrize("method", METHODS)
def test_blocks_with_outliers_stay_denser(tmp_path: Path, checkpoint: Path, method: str) -> None:
    model = load_model(checkpoint)
    with torch.no_grad():
        for path in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"):
            model.get_submodule(f"model.layers.1.{path}").weight[:, ::16] *= 30
    save_model(model, tmp_path / "in", like=checkpoint)
    metrics = prune(tmp_path / "in", tmp_path / "out", method=method, sparsity=0.5, allocation="sensitivity")
    assert metrics["sparsity"] == pytest.approx(0.5, abs=0.01)
    blocks = [torch.cat([m.flatten() for n, m in read_masks(tmp_path / "out", prefix=f"model.layers.{i}.").items()]) for i in (0, 1)]
    density = [float(block.float().mean()) for block in blocks]
    assert density[1] - density[0] == pytest.approx(0.16, abs=0.01)


@pytest.mark.parametrize("settings", [{"method": "sparsegpt"}, {"method": "gradient", "scope": "global"}], ids=lambda s: s["method"])
def test_the_same_input_gives_the_same_bytes(tmp_path: Path, checkpoint: Path, settings: dict[str, Any]) -> None:
    for name in ("a", "b"):
        prune(checkpoint, tmp_path / name, sparsity=0.5, **settings)
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert "masks.safetensors" in files
    assert files == sorted(file.name for file in (tmp_path / "b").iterdir())
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)


def test_layers_that_sparsegpt_cannot_solve_are_counted_said_and_pruned_as_by_wanda(tmp_path: Path, checkpoint: Path) -> None:
    warnings: list[str] = []
    one_token = torch.full((1, 1), 5)
    metrics = prune(checkpoint, tmp_path / "out", warnings=warnings, windows=one_token, sparsity=0.5, damp_percent=1e-12)
    assert metrics == {"sparsity": 0.5, "fallback_layers": 14.0}
    assert len(warnings) == 14
    assert "model.layers.0: self_attn.q_proj: the Hessian cannot be inverted; pruned by Wanda" in warnings[0]
    prune(checkpoint, tmp_path / "wanda", method="wanda", windows=one_token, sparsity=0.5)
    wanda = weights_of(tmp_path / "wanda")
    assert all(torch.equal(weight, wanda[name]) for name, weight in weights_of(tmp_path / "out").items())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", [*FAMILIES, "gpt_neox"])
def test_every_family_and_one_that_is_not_listed(tmp_path: Path, model_type: str, method: str) -> None:
    source = tiny_checkpoint(tmp_path / "in", model_type, hidden=32, intermediate=64, heads=2, kv_heads=1, tied=model_type != "gpt_neox")
    metrics = prune(source, tmp_path / "out", method=method, sparsity=0.5, pattern="2:4", windows=tiny_windows(count=4, length=16))
    assert metrics["sparsity"] == 0.5
    layers = [m for n, m in load_model(tmp_path / "out").named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n]
    assert len(layers) == len(read_masks(tmp_path / "out")) > 0
    assert all(((layer.weight.view(-1, 4) == 0).sum(1) == 2).all() for layer in layers)


def test_a_model_of_other_layers_is_refused(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "in", "mixtral")  # experts in one tensor, chosen by a router
    with pytest.raises(Incompatible, match="linear layers"):
        prune(source, tmp_path / "out", method="magnitude", sparsity=0.5)


@pytest.mark.parametrize(
    ("settings", "key", "message"),
    [
        ({"sparsity": 0.6, "pattern": "2:4"}, "sparsity", "the pattern 2:4 is a sparsity of 0.5, not 0.6"),
        ({"scope": "global"}, "scope", "goes with method: magnitude or gradient"),
        ({"method": "magnitude", "scope": "global", "pattern": "2:4"}, "scope", "compares 4 neighbours"),
        ({"method": "magnitude", "scope": "global", "allocation": "sensitivity"}, "allocation", "decides by itself"),
        ({"allocation": "sensitivity", "pattern": "4:8"}, "allocation", "equally sparse"),
    ],
)
def test_settings_that_contradict_each_other(tmp_path: Path, checkpoint: Path, settings: dict[str, Any], key: str, message: str) -> None:
    with pytest.raises(Incompatible, match=message) as refused:
        prune(checkpoint, tmp_path / "out", **({"sparsity": 0.5} | settings))
    assert refused.value.key == key
    assert not (tmp_path / "out").exists()


def test_a_width_that_the_pattern_does_not_divide_is_refused_while_planning(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "in", intermediate=124)
    stage = PruneUnstructured(sparsity=0.5, pattern="4:8")
    with pytest.raises(Incompatible, match=r"multiple of 8 wide; mlp.down_proj is 124 wide") as refused:
        stage.plan(open_checkpoint(source), {}, None)  # type: ignore[arg-type]
    assert refused.value.key == "pattern"
    with pytest.raises(Incompatible, match="multiple of 8"):
        prune(source, tmp_path / "out", sparsity=0.5, pattern="4:8")
    assert not (tmp_path / "out").exists()
    assert PruneUnstructured(sparsity=0.5, pattern="2:4").plan(open_checkpoint(source), {}, None).sparse  # type: ignore[arg-type, union-attr]


@pytest.mark.parametrize("method", METHODS[1:])
def test_calibration_is_asked_for(tmp_path: Path, checkpoint: Path, method: str) -> None:
    with pytest.raises(UnusableData, match=f"{method} needs calibration windows"):
        prune(checkpoint, tmp_path / "out", method=method, sparsity=0.5, windows=None)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path, checkpoint: Path) -> None:
    model = load_model(checkpoint)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = math.nan
    save_model(model, tmp_path / "in", like=checkpoint)
    with pytest.raises(UnusableModel, match=r"model.layers.1.mlp.up_proj.weight are not all finite"):
        prune(tmp_path / "in", tmp_path / "out", method="magnitude", sparsity=0.5)


def test_a_walk_that_was_killed_goes_on_to_the_same_bytes(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prune(checkpoint, tmp_path / "whole", sparsity=0.5)
    calls = 0

    def die_in_the_second_block(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return sparsegpt(*arguments, **named)

    monkeypatch.setattr("compression.pruning.unstructured.sparsegpt", die_in_the_second_block)
    with pytest.raises(KeyboardInterrupt):
        prune(checkpoint, tmp_path / "out", sparsity=0.5, work=tmp_path / "work")
    calls = 100
    prune(checkpoint, tmp_path / "out", sparsity=0.5, work=tmp_path / "work")
    assert calls == 104  # the four inputs of the second block, and none of the first
    for name in ("model.safetensors", "masks.safetensors", "layers.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
