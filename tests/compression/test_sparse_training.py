"""Sparse stays sparse in every training, and the two methods that find their zeros by training."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

from compression.checkpoints.loading import load_model
from compression.checkpoints.masks import read_masks
from compression.context import Context
from compression.errors import EdgepressError, Incompatible, UnusableModel
from compression.pruning import UnstructuredSettings, prune_unstructured
from compression.pruning.densities import layer_sparsities
from compression.pruning.rigl import RigL, moved
from compression.training import FixedMasks, TrainingSettings, attach_masks, attached_masks
from tests.tiny import tiny_windows
from tests.trainings import build_objective, run_distillation, run_finetuning, run_lottery, run_rigl, run_training

SETTINGS = TrainingSettings(steps=8, batch_size=4, learning_rate=1e-2, weight_decay=0.1, save_every=3)
Train = Callable[[Path, Path, Path, Context], dict[str, float]]


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """Half of its weights pruned by magnitude."""
    out = tmp_path_factory.mktemp("sparse") / "model"
    prune_unstructured(checkpoint, out, UnstructuredSettings(method="magnitude", sparsity=0.5), context=Context())
    return out


def by_distilling(model: Path, out: Path, work: Path, context: Context) -> dict[str, float]:
    return run_distillation(model, model, out, tiny_windows(9), alpha=0.0, beta=1.0, settings=SETTINGS, workdir=work, context=context)


def by_tuning(method: str) -> Train:
    def run(model: Path, out: Path, work: Path, context: Context) -> dict[str, float]:
        return run_finetuning(
            model, out, tiny_windows(9), method=method, rank=4, dropout=0.1, settings=SETTINGS, workdir=work, context=context,
            adapter_out=work.parent / "adapter",
        )  # fmt: skip

    return run


def by_rigl(model: Path, out: Path, work: Path, context: Context) -> dict[str, float]:
    return run_rigl(model, out, tiny_windows(9), sparsity=0.6, delta_t=2, settings=SETTINGS, workdir=work, context=context)


def by_lottery(model: Path, out: Path, work: Path, context: Context) -> dict[str, float]:
    return run_lottery(
        model, out, tiny_windows(9), sparsity=0.75, rounds=2, rewind_step=4, settings=SETTINGS, workdir=work, context=context
    )


TRAININGS = {"distill": by_distilling, "full": by_tuning("full"), "lora": by_tuning("lora"), "rigl": by_rigl, "lottery": by_lottery}


def dying(calls: int) -> Context:
    left = iter(range(calls))

    def progress(done: int, total: int, what: str) -> None:
        if next(left, None) is None:
            raise InterruptedError

    return Context(seed=3, progress=progress)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAININGS)
def test_is_as_sparse_as_its_masks_also_after_a_kill(tmp_path: Path, sparse: Path, name: str) -> None:
    run = TRAININGS[name]
    run(sparse, tmp_path / "whole", tmp_path / "a" / "work", Context(seed=3))
    for calls in (4, 7):  # the lottery trains twice, so its second kill is in the second round
        with pytest.raises(InterruptedError):
            run(sparse, tmp_path / "killed", tmp_path / "b" / "work", dying(calls))
            raise InterruptedError  # a training of 8 steps that resumes at step 3 is not killed again
        shutil.rmtree(tmp_path / "killed", ignore_errors=True)
    run(sparse, tmp_path / "killed", tmp_path / "b" / "work", Context(seed=3))
    for file in ("model.safetensors", "masks.safetensors"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "killed" / file).read_bytes()
    masks, after, before = read_masks(tmp_path / "whole"), load_file(tmp_path / "whole" / "model.safetensors"), read_masks(sparse)
    assert masks.keys() == before.keys()
    moved_weights = 0.0
    for weight, mask in masks.items():
        assert torch.equal(after[weight] != 0, mask), weight
        if name not in ("rigl", "lottery"):
            assert torch.equal(mask, before[weight])
        moved_weights += float((after[weight] - load_file(sparse / "model.safetensors")[weight]).abs().sum())
    assert moved_weights > 1


def test_a_pruned_weight_has_no_moments_and_counts_in_no_norm(tmp_path: Path, sparse: Path) -> None:
    """Against AdamW on a model whose pruned weights are no parameters at all: each is multiplied by its mask in the forward pass."""
    rows = tiny_windows(8)
    masks = read_masks(sparse)
    ours, plain = load_model(sparse), load_model(sparse)
    attach_masks(ours, masks)
    run_training(
        build_objective(ours, beta=1.0), rows, mask=None, settings=SETTINGS.model_copy(update={"steps": 4, "batch_size": 8, "schedule": "constant", "warmup_ratio": 0}),
        origin={}, workdir=tmp_path, context=Context(), name="train",
    )  # fmt: skip
    decayed = [parameter for parameter in plain.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in plain.parameters() if parameter.ndim != 2]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=1e-2, weight_decay=0.1)
    for _ in range(4):
        weights = {name: weight * masks[name] if name in masks else weight for name, weight in plain.named_parameters()}
        logits = torch.func.functional_call(plain, weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}, (rows,)).logits
        optimizer.zero_grad()
        functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
    for (name, weight), expected in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(weight, expected * masks[name] if name in masks else expected, rtol=1e-3, atol=2e-5)
    state = torch.load(tmp_path / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"]
    matrices = [name for name, weight in ours.named_parameters() if weight.ndim == 2]
    for index, name in enumerate(matrices):
        if name in masks:
            assert not state[index]["exp_avg"][~masks[name]].any()
            assert not state[index]["exp_avg_sq"][~masks[name]].any()
            assert state[index]["exp_avg"][masks[name]].any()


def test_the_update_that_is_merged_is_the_one_that_was_trained(tmp_path: Path, sparse: Path) -> None:
    """W + M ⊙ s·B·A in float64, from the adapter as it is kept; and the loss at the end is that of the model that is written."""
    rows = tiny_windows(4)
    settings = SETTINGS.model_copy(update={"evaluate_every": 8})
    metrics = run_finetuning(
        sparse, tmp_path / "out", rows, validation=(rows, None), rank=4, alpha=8, settings=settings, workdir=tmp_path / "work",
        context=Context(), adapter_out=tmp_path / "adapter",
    )  # fmt: skip
    before, after = (load_file(path / "model.safetensors") for path in (sparse, tmp_path / "out"))
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, mask in read_masks(sparse).items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        update = 2 * adapter[f"{stem}.lora_B.weight"].double() @ adapter[f"{stem}.lora_A.weight"].double()
        torch.testing.assert_close(after[name].double(), before[name].double() + mask * update, rtol=1e-5, atol=1e-6)
        assert (update * ~mask).abs().max() > 1e-3  # unmasked, it would have filled the zeros
    with torch.no_grad():
        written = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(rows, labels=rows).loss.item()
        unmasked = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sparse), tmp_path / "adapter")
        assert unmasked(rows, labels=rows).loss.item() != pytest.approx(written, rel=1e-3)
    assert metrics["validation_loss"] == pytest.approx(written, rel=1e-5)


def test_masks_of_another_model_are_refused(checkpoint: Path) -> None:
    model = load_model(checkpoint)
    with pytest.raises(UnusableModel, match="no such weight"):
        attach_masks(model, {"model.layers.9.mlp.up_proj.weight": torch.ones(128, 64, dtype=torch.bool)})
    with pytest.raises(UnusableModel, match=r"\[2, 2\]"):
        attach_masks(model, {"model.layers.0.mlp.up_proj.weight": torch.ones(2, 2, dtype=torch.bool)})
    assert FixedMasks(model).masks == {}


# RigL


class Watched(RigL):
    """Tells at each update what there was before and after it."""

    seen: list[tuple[int, dict[str, tuple[torch.Tensor, ...]]]]

    def before_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        if not self.moves(step):
            return super().before_step(step, optimizer)
        before = {name: (self.masks[name].clone(), w.detach().clone(), w.grad.clone()) for name, w in self.weights.items()}
        super().before_step(step, optimizer)
        moments = {name: optimizer.state[w]["exp_avg"].clone() for name, w in self.weights.items()}
        self.seen.append(
            (step, {name: (*before[name], self.masks[name].clone(), w.detach().clone(), moments[name]) for name, w in self.weights.items()})
        )
        return None


@pytest.fixture(scope="module")
def updates(tmp_path_factory: pytest.TempPathFactory, sparse: Path) -> Iterator[Watched]:
    model = load_model(sparse)
    attach_masks(model, read_masks(sparse))
    objective = build_objective(model, beta=1.0)
    rigl = Watched(objective, drop_fraction=0.4, delta_t=3, last_step=9)
    rigl.seen = []
    run_training(
        objective, tiny_windows(8), mask=None, settings=SETTINGS.model_copy(update={"steps": 12}), origin={}, workdir=tmp_path_factory.mktemp("rigl"),
        context=Context(), name="RigL", masks=rigl,
    )  # fmt: skip
    return rigl


def test_rigl_moves_on_the_papers_schedule(updates: Watched) -> None:
    """Every ΔT steps before T_end; f_decay(t; α, T_end) = α/2 (1 + cos(tπ/T_end))."""
    assert [step for step, _ in updates.seen] == [3, 6]
    for step, layers in updates.seen:
        expected = 0.4 / 2 * (1 + math.cos(step * math.pi / 9))
        assert updates.fraction(step) == pytest.approx(expected)
        for before, weight, gradient, after, *_ in layers.values():
            assert before.sum() == after.sum()
            assert after.dtype == torch.bool
            k = int(expected * int(before.sum()))
            kept = set(before.flatten().nonzero().flatten().tolist())
            sizes, slopes = weight.flatten().double().abs().tolist(), gradient.flatten().double().abs().tolist()
            kept -= set(sorted(kept, key=lambda index: sizes[index])[:k])
            free = set(range(before.numel())) - kept
            kept |= set(sorted(free, key=lambda index: -slopes[index])[:k])
            assert kept == set(after.flatten().nonzero().flatten().tolist())
            assert (after != before).any()


def test_what_grows_starts_from_nothing_and_nothing_is_trained_meanwhile(updates: Watched) -> None:
    for _, layers in updates.seen:
        for before, weight, gradient, after, later, moments in layers.values():
            assert gradient[~before].abs().max() > 0  # dense
            assert not later[after & ~before].any()
            assert not moments[~(after & before)].any()
            assert torch.equal(later[after & before], weight[after & before])
            assert not later[~after].any()


def test_an_update_leaves_every_weight_alone_but_those_that_it_drops(tmp_path: Path, sparse: Path) -> None:
    def after(steps: int, name: str) -> dict[str, torch.Tensor]:
        model = load_model(sparse)
        attach_masks(model, read_masks(sparse))
        objective = build_objective(model, beta=1.0)
        settings = SETTINGS.model_copy(update={"steps": steps, "schedule": "constant", "warmup_ratio": 0})
        rigl = RigL(objective, drop_fraction=0.3, delta_t=2, last_step=100)
        run_training(
            objective,
            tiny_windows(8),
            mask=None,
            settings=settings,
            origin={},
            workdir=tmp_path / name,
            context=Context(),
            name="",
            masks=rigl,
        )
        return {name: weight.detach() for name, weight in model.named_parameters()}

    one, two = after(1, "one"), after(2, "two")
    for name, weight in one.items():
        assert torch.equal(two[name], weight * (two[name] != 0) if name in read_masks(sparse) else weight), name


def test_equal_weights_and_gradients_move_as_many() -> None:
    mask = torch.tensor([[True, True, False, False]])
    after = moved(torch.ones(1, 4) * mask, torch.ones(1, 4), mask, 0.5)
    assert after.sum() == 2


def test_erk_is_the_papers_formula() -> None:
    """Density of a layer = ε (n_in + n_out) / (n_in n_out), one ε for all that are not dense; together the share asked for."""
    shapes = {"wide": (512, 2048), "tall": (2048, 512), "square": (512, 512), "small": (8, 16)}
    for sparsity in (0.5, 0.8, 0.95):
        found = layer_sparsities(shapes, sparsity, "erk")
        sizes = {name: out * width for name, (out, width) in shapes.items()}
        assert sum(found[name] * sizes[name] for name in shapes) / sum(sizes.values()) == pytest.approx(sparsity)
        scales = {name: (1 - found[name]) * sizes[name] / sum(shapes[name]) for name in shapes if found[name] > 0}
        assert max(scales.values()) == pytest.approx(min(scales.values()))
        assert found["small"] == 0
    assert layer_sparsities(shapes, 0.7, "uniform") == dict.fromkeys(shapes, 0.7)


def test_rigl_from_a_dense_model_reaches_its_sparsity(tmp_path: Path, checkpoint: Path) -> None:
    for distribution in ("uniform", "erk"):
        metrics = run_rigl(
            checkpoint, tmp_path / distribution, tiny_windows(8), sparsity=0.7, distribution=distribution, delta_t=2, settings=SETTINGS,
            workdir=tmp_path / f"{distribution}-work", context=Context(),
        )  # fmt: skip
        assert metrics["sparsity"] == pytest.approx(0.7, abs=1e-3)
        assert metrics["mask_updates"] == 2  # at steps 2 and 4, before 0.75 of 8
        layers = [float((~mask).float().mean()) for mask in read_masks(tmp_path / distribution).values()]
        assert (max(layers) - min(layers) < 1e-3) == (distribution == "uniform")


def test_rigl_does_not_make_a_model_denser(tmp_path: Path, sparse: Path) -> None:
    with pytest.raises(Incompatible, match="0.500 sparse already") as caught:
        run_rigl(sparse, tmp_path / "out", tiny_windows(), sparsity=0.3, settings=SETTINGS, workdir=tmp_path / "work", context=Context())
    assert caught.value.key == "sparsity"


# Lottery tickets


def lottery(model: Path, place: Path, **parameters: object) -> dict[str, float]:
    return run_lottery(
        model, place / "out", tiny_windows(8), workdir=place / "work", context=Context(),
        **{"sparsity": 0.75, "rounds": 2, "settings": SETTINGS, **parameters},
    )  # fmt: skip


def magnitudes(model: torch.nn.Module, masks: dict[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    """The masks of the `count` largest of the weights that `masks` keep, by sorting them all."""
    names = list(masks)
    weights = dict(model.named_parameters())
    values = torch.cat([torch.where(masks[name], weights[name].detach().abs(), -1.0).flatten() for name in names])
    keep = torch.zeros_like(values, dtype=torch.bool)
    keep[values.argsort(descending=True)[:count]] = True
    return {name: part.view(masks[name].shape) for name, part in zip(names, keep.split([masks[n].numel() for n in names]), strict=True)}


def test_rounds_of_another_search_are_not_taken_up(tmp_path: Path, checkpoint: Path) -> None:
    settings = TrainingSettings(steps=2, batch_size=4)
    lottery(checkpoint, tmp_path, settings=settings)
    for other in ({"sparsity": 0.5}, {"rounds": 3}, {"scope": "layer"}):
        with pytest.raises(EdgepressError, match="another method, on another model"):
            lottery(checkpoint, tmp_path, settings=settings, **other)


@pytest.mark.slow
@pytest.mark.parametrize(("rewind_step", "kept"), [(0, 1.0), (3, 1.0), (3, 0.5)])
def test_a_ticket_is_what_plain_rounds_of_training_and_sorting_find(
    tmp_path: Path, checkpoint: Path, sparse: Path, rewind_step: int, kept: float
) -> None:
    """The rounds by hand: the loop of this package, started over from the weights, sorted in one piece."""
    parent = checkpoint if kept == 1 else sparse
    metrics = lottery(parent, tmp_path, rewind_step=rewind_step)
    names = [name for name in load_file(parent / "model.safetensors") if "_proj" in name]
    model = load_model(parent)
    masks = {name: torch.ones_like(model.get_parameter(name), dtype=torch.bool) for name in names} | read_masks(parent)
    attach_masks(model, masks)
    total = sum(mask.numel() for mask in masks.values())
    objective = build_objective(model, beta=1.0)
    begun: dict[str, torch.Tensor] = {}

    def watch(done: int, _: int, what: str) -> None:
        if done == rewind_step:
            begun.update({name: weight.detach().clone() for name, weight in model.named_parameters()})

    if rewind_step == 0:
        watch(0, 0, "")
    hands = {"rows": tiny_windows(8), "mask": None, "settings": SETTINGS, "name": "by hand"}
    run_training(objective, **hands, origin={}, workdir=tmp_path / "hand-1", context=Context(progress=watch), keep_step=rewind_step or None)
    masks = magnitudes(model, masks, total - round((1 - math.sqrt(kept * 0.25)) * total))
    again = load_model(parent)
    attach_masks(again, masks)
    start = tmp_path / "hand-1" / "kept" if rewind_step else None
    run_training(build_objective(again, beta=1.0), **hands, origin={}, workdir=tmp_path / "hand-2", context=Context(), start=start)
    masks = magnitudes(again, masks, total - round(0.75 * total))
    found, written = read_masks(tmp_path / "out"), load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == masks.keys()
    for name, mask in masks.items():
        assert torch.equal(found[name], mask)
        assert torch.equal(written[name], begun[name] * mask)
    assert torch.equal(written["model.embed_tokens.weight"], begun["model.embed_tokens.weight"])
    assert metrics["sparsity"] == pytest.approx(0.75, abs=1e-4)


def test_a_ticket_is_judged_anew(tmp_path: Path, checkpoint: Path) -> None:
    """Its best weights are its own, however good those before the rewinding were on the validation rows."""
    lottery(
        checkpoint, tmp_path, rewind_step=4, finish=True, settings=SETTINGS.model_copy(update={"evaluate_every": 2, "learning_rate": 0.1}),
        validation=(tiny_windows(4, seed=7), None),
    )  # fmt: skip
    state = json.loads((tmp_path / "work" / "ticket" / "checkpoint-8" / "validation.json").read_text())
    assert state["best_step"] in (6, 8)
    assert json.loads((tmp_path / "work" / "round-1" / "found" / "metrics.json").read_text())["best_step"] <= 4


def test_a_rewind_step_that_early_stopping_does_not_reach(tmp_path: Path, checkpoint: Path) -> None:
    settings = SETTINGS.model_copy(update={"evaluate_every": 1, "patience": 1, "learning_rate": 0.1})
    with pytest.raises(EdgepressError, match="stopped early") as caught:
        lottery(checkpoint, tmp_path, rewind_step=7, settings=settings, validation=(tiny_windows(4, seed=7), None))
    assert caught.value.key == "rewind_step"


def test_finish_trains_the_ticket(tmp_path: Path, checkpoint: Path) -> None:
    rewound, finished = (lottery(checkpoint, tmp_path / str(finish), finish=finish) for finish in (False, True))
    masks = read_masks(tmp_path / "True" / "out")
    assert all(torch.equal(mask, read_masks(tmp_path / "False" / "out")[name]) for name, mask in masks.items())
    after, before = (load_file(tmp_path / name / "out" / "model.safetensors") for name in ("True", "False"))
    assert all(torch.equal(after[name] != 0, mask) for name, mask in masks.items())
    assert not torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert rewound["sparsity"] == finished["sparsity"]


def test_layer_scope_prunes_every_layer_alike_and_rounds_that_are_done_are_kept(tmp_path: Path, checkpoint: Path) -> None:
    lottery(checkpoint, tmp_path, scope="layer")
    for mask in read_masks(tmp_path / "out").values():
        assert float((~mask).float().mean()) == pytest.approx(0.75, abs=1e-3)
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["round-1", "round-2", "search"]
    assert [path.name for path in (tmp_path / "work" / "round-2").iterdir()] == ["found"]
    assert json.loads((tmp_path / "work" / "round-1" / "found" / "metrics.json").read_text())["steps"] == 8


@pytest.mark.parametrize(
    ("parameters", "key"), [({"rewind_step": 8}, "rewind_step"), ({"rounds": 0}, "rounds"), ({"sparsity": 0.4}, "sparsity")]
)
def test_lotteries_that_cannot_be_held(tmp_path: Path, sparse: Path, parameters: dict[str, object], key: str) -> None:
    with pytest.raises((EdgepressError, ValidationError)) as caught:
        lottery(sparse, tmp_path, **parameters)
    assert key == (caught.value.key if isinstance(caught.value, EdgepressError) else caught.value.errors()[0]["loc"][0])
    assert attached_masks(load_model(sparse)) == {}
