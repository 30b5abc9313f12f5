"""L_feature against float64 formulas and finite differences on plain transformers models; pairs of blocks of pruned students; every family."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedModel

from compression.checkpoints.families import FAMILIES
from compression.checkpoints.loading import load_model
from compression.context import Context
from compression.distillation import Objective, pair_layers
from compression.distillation.features import extract_features
from compression.distillation.settings import Feature
from compression.errors import EdgepressError, Incompatible
from compression.pruning import DepthSettings, WidthSettings, prune_depth, prune_width
from tests.tiny import tiny_checkpoint, tiny_windows
from tests.trainings import build_objective

FEATURES: list[Feature] = ["hidden_mse", "hidden_cosine", "attention", "gradient"]


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of another width, depth and number of heads than the teacher `checkpoint`."""
    path = tmp_path_factory.mktemp("narrow") / "llama"
    return tiny_checkpoint(path, hidden=32, intermediate=96, layers=3, heads=2, kv_heads=1, seed=7)


def masked(rows: int = 3, length: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    return tiny_windows(rows, length), torch.arange(length)[None] >= torch.tensor([5, 0, 11][:rows])[:, None]


def objective_of(student: Path, teacher: Path, feature: Feature, layers: dict[int, int], **weights: float) -> Objective:
    models = load_model(student).double(), load_model(teacher).double()
    return build_objective(models[0], teacher=models[1], feature=feature, layers=layers, **({"gamma": 1.0} | weights)).double()


def plain(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="eager").eval()


def projection(objective: Objective, layer: int) -> np.ndarray:
    return objective.projectors.maps[str(layer)].weight.detach().numpy().T


def test_hidden_states_are_compared_by_their_angle(checkpoint: Path, narrow: Path) -> None:
    objective = objective_of(narrow, checkpoint, "hidden_cosine", {0: 0, 2: 1})
    rows, mask = masked()
    with torch.no_grad():
        ours, theirs = (plain(path)(input_ids=rows, output_hidden_states=True).hidden_states for path in (narrow, checkpoint))
    distances = []
    for block, other in ((0, 0), (2, 1)):
        for row, position in (mask[:, 1:]).nonzero().tolist():
            s, t = ours[block + 1][row, position].numpy() @ projection(objective, block), theirs[other + 1][row, position].numpy()
            distances.append(1 - s @ t / np.linalg.norm(s) / np.linalg.norm(t))
    assert objective(rows, mask)["loss_feature"].item() == pytest.approx(np.mean(distances), rel=1e-7)


def test_attention_maps_of_models_with_other_heads_are_compared(checkpoint: Path, narrow: Path) -> None:
    objective = objective_of(narrow, checkpoint, "attention", {1: 0})
    rows, mask = masked()
    with torch.no_grad():
        ours, theirs = (plain(path)(input_ids=rows, output_attentions=True).attentions for path in (narrow, checkpoint))
    assert ours[1].shape[1] == 2 and theirs[0].shape[1] == 4
    difference = (ours[1].numpy().mean(1) - theirs[0].numpy().mean(1)) ** 2
    expected = [difference[row, position].sum() for row, position in mask[:, 1:].nonzero().tolist()]
    assert objective(rows, mask)["loss_feature"].item() == pytest.approx(np.mean(expected), rel=1e-7)
    assert not list(objective.projectors.parameters())


def numeric_gradient(path: Path, rows: torch.Tensor, mask: torch.Tensor, module: str, step: float = 2e-3) -> np.ndarray:
    """[length, width]: the answer of the summed cross-entropy of one row to a change of a module's output, by central differences."""
    model = plain(path)
    length, width = rows.shape[1], model.config.hidden_size
    changes = step * torch.eye(length * width, dtype=torch.float64).view(-1, length, width)
    sign = 1.0

    def shift(part: torch.nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        return output + sign * changes

    model.get_submodule(module).register_forward_hook(shift)
    losses = []
    for sign in (1.0, -1.0):  # noqa: B007  (read by the hook)
        with torch.no_grad():
            log_probs = model(input_ids=rows.expand(len(changes), -1)).logits[:, :-1].log_softmax(-1)
        chosen = log_probs.gather(-1, rows[:, 1:].expand(len(changes), -1)[..., None])[..., 0]
        losses.append(-(chosen * mask[:, 1:]).sum(1))
    return ((losses[0] - losses[1]) / (2 * step)).view(length, width).numpy()


@pytest.mark.parametrize(
    ("block", "ours", "other", "theirs"), [(0, "model.layers.0", 0, "model.layers.0"), (2, "model.norm", 1, "model.norm")]
)
@pytest.mark.parametrize("max_logits", [2**24, 320 * 2])
def test_gradients_are_those_of_the_task_loss(
    checkpoint: Path, narrow: Path, block: int, ours: str, other: int, theirs: str, max_logits: int
) -> None:
    rows, mask = tiny_windows(1, 6), torch.tensor([[True, True, False, True, True, True]])
    objective = objective_of(narrow, checkpoint, "gradient", {block: other}, max_logits=max_logits)
    student = numeric_gradient(narrow, rows, mask, ours) @ projection(objective, block)
    teacher = numeric_gradient(checkpoint, rows, mask, theirs)
    expected = [
        1 - student[p] @ teacher[p] / np.linalg.norm(student[p]) / np.linalg.norm(teacher[p]) for p in mask[0, 1:].nonzero()[:, 0].tolist()
    ]
    assert objective(rows, mask)["loss_feature"].item() == pytest.approx(np.mean(expected), rel=1e-4)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("max_logits", [2**24, 320 * 4])
def test_the_student_learns_along_the_slope_of_the_loss(checkpoint: Path, narrow: Path, feature: Feature, max_logits: int) -> None:
    """The slope of the whole loss along the gradient of all that learns, against central differences (norms and softmax are in float32)."""
    objective = objective_of(narrow, checkpoint, feature, {0: 0, 1: 1}, alpha=0.5, beta=0.25, max_logits=max_logits)
    batch = masked()
    objective(*batch)["loss"].backward()
    learning = {parameter: parameter.grad.clone() for parameter in objective.parameters() if parameter.grad is not None}
    slope = torch.cat([gradient.flatten() for gradient in learning.values()]).norm().item()

    @torch.no_grad()
    def move(by: float) -> None:
        for parameter, gradient in learning.items():
            parameter.add_(gradient, alpha=by / slope)

    losses = []
    for by in (1e-3, -2e-3):
        move(by)
        losses.append(objective(*batch)["loss"].item())
    assert slope == pytest.approx((losses[0] - losses[1]) / 2e-3, rel=1e-3)
    assert not any(parameter.grad is not None for parameter in objective.frozen[0].parameters())


@pytest.mark.parametrize("feature", FEATURES)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(checkpoint: Path, feature: Feature) -> None:
    objective = objective_of(checkpoint, checkpoint, feature, {0: 0, 1: 1})
    assert objective(*masked())["loss_feature"].item() == pytest.approx(0, abs=1e-12)
    with torch.no_grad():  # a validation loss
        assert objective(*masked())["loss_feature"].item() == pytest.approx(0, abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_trains_with_every_term(tmp_path: Path, family: str) -> None:
    """cross-entropy against transformers' own loss; the student has half the heads and neurons and lost a block."""
    teacher = tiny_checkpoint(tmp_path / "teacher", family, layers=3, hidden=32, intermediate=64)
    prune_width(teacher, tmp_path / "thin", WidthSettings(keep=0.5, keep_heads=0.5), context=Context())
    prune_depth(tmp_path / "thin", tmp_path / "student", DepthSettings(blocks=(1,)), context=Context())
    rows, mask = masked()
    labels = rows.masked_fill(~mask, -100)
    for feature in FEATURES:
        student = load_model(tmp_path / "student")
        objective = build_objective(
            student, teacher=load_model(teacher), alpha=1.0, beta=1.0, gamma=1.0, temperature=2.0, feature=feature, layers={0: 0, 1: 2}
        )  # fmt: skip
        terms = objective(rows, mask)
        assert terms["loss_task"].item() == pytest.approx(student(input_ids=rows, labels=labels).loss.item(), rel=1e-5)
        terms["loss"].backward()
        silent = [name for name, p in student.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
        assert not silent
        assert all(p.grad.isfinite().all() for p in student.parameters())


def test_logits_that_are_capped_are_refused(tmp_path: Path) -> None:
    capped = tiny_checkpoint(tmp_path / "gemma", "gemma3_text", final_logit_softcapping=5.0)
    with pytest.raises(Incompatible, match="after the output head"):
        build_objective(load_model(capped), beta=1.0)


def test_nothing_of_it_is_written_into_the_student(tmp_path: Path, checkpoint: Path) -> None:
    student = load_model(checkpoint)
    build_objective(student, teacher=load_model(checkpoint), gamma=1.0, feature="attention", layers={0: 0})
    student.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text() == (checkpoint / "config.json").read_text()


def test_a_model_that_hides_its_maps_is_refused(checkpoint: Path) -> None:
    model = load_model(checkpoint)
    model.set_attn_implementation("eager")
    model.base_model.register_forward_hook(lambda module, inputs, output: output.__class__(last_hidden_state=output.last_hidden_state))
    with pytest.raises(Incompatible, match="does not return its attention maps"):
        extract_features(model, tiny_windows(1, 8), torch.ones(1, 7, dtype=torch.bool), [0], "attention", max_logits=2**24)


def test_pairs_of_layers() -> None:
    assert pair_layers("last", 4, 6) == {3: 5}
    assert pair_layers("middle", 12, 12) == {5: 5}
    assert pair_layers("middle", 3, 6) == {1: 2}
    assert pair_layers("uniform", 3, 6) == {0: 1, 1: 3, 2: 5}
    assert pair_layers("uniform", 3, 2) == {0: 0, 1: 1, 2: 1}
    assert pair_layers("uniform", 3, 6, [0, 4, 5]) == {0: 0, 1: 4, 2: 5}
    assert pair_layers("last", 3, 6, [0, 1, 2]) == {2: 5}
    assert pair_layers({0: 5}, 3, 6) == {0: 5}
    for spec, message in (({3: 0}, "block 3 of the student, which has blocks 0 to 2"), ({0: 6}, "block 6 of the teacher"), ({}, "is {}")):
        with pytest.raises(EdgepressError, match=message):
            pair_layers(spec, 3, 6)


@given(student=st.integers(1, 60), teacher=st.integers(1, 60))
def test_uniform_pairs_every_student_layer_in_order(student: int, teacher: int) -> None:
    """Whichever of the two is deeper; a shallower student never meets a teacher block twice."""
    pairs = pair_layers("uniform", student, teacher)
    assert list(pairs) == list(range(student))
    assert all(0 <= other < teacher for other in pairs.values())
    assert list(pairs.values()) == sorted(pairs.values())
    assert pairs[student - 1] == teacher - 1
    assert len(set(pairs.values())) == min(student, teacher)
