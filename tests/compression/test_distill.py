"""The objective against plain transformers and float64 numpy; distillation from directory to directory."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from compression.checkpoints.checkpoint import open_checkpoint
from compression.checkpoints.kept import read_kept
from compression.checkpoints.loading import copy_tokenizer, load_model
from compression.context import Context
from compression.distillation import Objective, ObjectiveSettings, check_vocabularies
from compression.errors import EdgepressError, Incompatible, UnusableData
from compression.pruning import DepthSettings, WidthSettings, prune_depth, prune_width
from compression.training import TrainingSettings
from tests.compression.test_losses import reference_kl, softmax
from tests.tiny import tiny_checkpoint, tiny_windows
from tests.trainings import build_objective, run_distillation

SETTINGS = TrainingSettings(steps=20, batch_size=4, learning_rate=1e-2, save_every=100)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of another width and depth than the teacher `checkpoint`, stored in float16."""
    path = tmp_path_factory.mktemp("narrow") / "llama"
    return tiny_checkpoint(path, hidden=32, intermediate=96, layers=3, dtype=torch.float16, seed=7)


def prompt_masked() -> tuple[torch.Tensor, torch.Tensor]:
    rows = tiny_windows(3, 16)
    return rows, torch.arange(16)[None] >= torch.tensor([5, 0, 11])[:, None]


def reference(student: PreTrainedModel, teacher: PreTrainedModel, pairs: dict[int, tuple[int, np.ndarray]]) -> dict[str, float]:
    """The terms in float64 from what plain transformers gives, one counted position after the other.

    pairs  student block -> (teacher block, projection [student width, teacher width])
    """
    rows, mask = prompt_masked()
    ours, theirs = (model.double()(input_ids=rows, output_hidden_states=True) for model in (student, teacher))
    kd, task, feature = [], [], []
    for row in range(3):
        for position in range(15):
            if not mask[row, position + 1]:
                continue
            s, t = (output.logits[row, position].detach().numpy() for output in (ours, theirs))
            kd.append(reference_kl(s, t, 2.0))
            task.append(-np.log(softmax(s)[rows[row, position + 1]]))
            for block, (other, projection) in pairs.items():
                s, t = (o.hidden_states[b + 1][row, position].detach().numpy() for o, b in ((ours, block), (theirs, other)))
                feature.append(((s @ projection - t) ** 2).mean())
    return {"loss_kd": np.mean(kd), "loss_task": np.mean(task), "loss_feature": np.mean(feature)}


@pytest.mark.parametrize("max_logits", [2**24, 320 * 4])
def test_the_terms_are_the_formulas_over_counted_positions(checkpoint: Path, narrow: Path, max_logits: int) -> None:
    student, teacher = load_model(narrow), load_model(checkpoint)
    objective = build_objective(
        student, teacher=teacher, alpha=0.7, beta=0.2, gamma=0.1, temperature=2.0, layers={0: 0, 2: 1}, max_logits=max_logits
    )  # fmt: skip
    terms = {name: value.item() for name, value in objective(*prompt_masked()).items()}
    projections = {int(layer): linear.weight.detach().double().numpy().T for layer, linear in objective.projectors.maps.items()}
    expected = reference(student, teacher, {0: (0, projections[0]), 2: (1, projections[2])})
    expected["loss"] = 0.7 * expected["loss_kd"] + 0.2 * expected["loss_task"] + 0.1 * expected["loss_feature"]
    assert terms == pytest.approx(expected, rel=1e-4)


def test_chunks_do_not_change_the_gradient(checkpoint: Path, narrow: Path) -> None:
    gradients = []
    for max_logits in (2**24, 320 * 4):
        student = load_model(narrow)
        build_objective(student, teacher=load_model(checkpoint), alpha=1.0, beta=1.0, max_logits=max_logits)(*prompt_masked())[
            "loss"
        ].backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in student.parameters()]))
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_only_what_a_weight_asks_for_is_computed(checkpoint: Path, narrow: Path) -> None:
    asked: list[bool] = []
    heads: list[str] = []

    def note(module: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, Any]) -> None:
        asked.append(kwargs["output_hidden_states"])

    def spy(model: PreTrainedModel, name: str) -> PreTrainedModel:
        model.base_model.register_forward_pre_hook(note, with_kwargs=True)
        model.get_output_embeddings().register_forward_hook(lambda *_: heads.append(name))
        return model

    def calls(**weights: float) -> tuple[list[bool], list[str]]:
        objective = build_objective(load_model(narrow), teacher=load_model(checkpoint), layers={0: 0}, **weights)
        spy(objective.student, "student")
        spy(objective.frozen[0], "teacher")
        asked.clear()
        heads.clear()
        objective(*prompt_masked())
        return list(asked), list(heads)

    assert calls(alpha=1.0) == ([False, False], ["student", "teacher"])
    assert calls(gamma=1.0) == ([True, True], [])
    assert calls(alpha=1.0, beta=1.0, gamma=1.0) == ([True, True], ["student", "teacher"])


def test_without_alpha_and_gamma_no_teacher_is_opened(tmp_path: Path, checkpoint: Path) -> None:
    metrics = run_distillation(
        checkpoint, tmp_path / "no such teacher", tmp_path / "out", tiny_windows(), alpha=0.0, beta=1.0,
        settings=SETTINGS, workdir=tmp_path / "work", context=Context(),
    )  # fmt: skip
    assert metrics["loss"] == metrics["loss_task"]
    assert "loss_kd" not in metrics


def test_brings_the_student_to_its_teacher(tmp_path: Path, checkpoint: Path, narrow: Path) -> None:
    """Judged by plain transformers on what was written; the projector is gone, and the dtype is the student's."""
    out, rows = tmp_path / "out", tiny_windows(8)
    save_file({"mlp": torch.arange(3)}, narrow / "kept.safetensors")
    curve: list[dict[str, float]] = []
    metrics = run_distillation(
        narrow, checkpoint, out, rows, alpha=1.0, beta=0.1, gamma=0.1, feature_layers="uniform",
        settings=TrainingSettings(steps=60, batch_size=8, learning_rate=1e-2), workdir=tmp_path / "work",
        context=Context(metrics=lambda values, step: curve.append(dict(values))),
    )  # fmt: skip
    (narrow / "kept.safetensors").rename(tmp_path / "kept.safetensors")

    def distance(path: Path) -> float:
        with torch.no_grad():
            student, teacher = (
                AutoModelForCausalLM.from_pretrained(p, dtype=torch.float64)(rows).logits.numpy() for p in (path, checkpoint)
            )
        return float(reference_kl(student, teacher, 2.0).mean())

    assert distance(out) < 0.7 * distance(narrow)
    assert metrics.keys() >= {
        "loss",
        "loss_kd",
        "loss_task",
        "loss_feature",
        "learning_rate",
        "training_tokens_per_second",
        "steps",
        "seconds",
    }
    for name in ("loss_kd", "loss_feature"):
        assert curve[-1][name] < curve[0][name]
    before, after = load_file(narrow / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert {tensor.dtype for tensor in after.values()} == {torch.float16}
    assert (out / "tokenizer.json").read_bytes() == (narrow / "tokenizer.json").read_bytes()
    assert (out / "kept.safetensors").read_bytes() == (tmp_path / "kept.safetensors").read_bytes()


def test_another_teacher_is_another_training(tmp_path: Path, checkpoint: Path) -> None:
    def taught_by(teacher: Path) -> None:
        run_distillation(
            checkpoint, teacher, tmp_path / "out", tiny_windows(4), settings=TrainingSettings(steps=2, batch_size=4), workdir=tmp_path / "work",
            context=Context(),
        )  # fmt: skip

    taught_by(tiny_checkpoint(tmp_path / "one", seed=1))
    with pytest.raises(EdgepressError, match="another method, on another model"):
        taught_by(tiny_checkpoint(tmp_path / "two", seed=2))


def test_the_projector_starts_orthogonal_and_only_where_widths_differ(checkpoint: Path, narrow: Path) -> None:
    objective = build_objective(load_model(narrow), teacher=load_model(checkpoint), gamma=1.0, layers={1: 0}, seed=3)
    weight = objective.projectors.maps["1"].weight  # [64, 32]
    torch.testing.assert_close(weight.T @ weight, torch.eye(32), rtol=0, atol=1e-5)
    again = build_objective(load_model(narrow), teacher=load_model(checkpoint), gamma=1.0, layers={1: 0}, seed=3)
    assert torch.equal(weight, again.projectors.maps["1"].weight)
    equal = build_objective(load_model(checkpoint), teacher=load_model(checkpoint), gamma=1.0, layers={1: 1})
    assert not list(equal.projectors.parameters())
    assert equal(*prompt_masked())["loss_feature"].item() == 0


def test_padded_embeddings_share_a_vocabulary(tmp_path: Path, checkpoint: Path) -> None:
    """Qwen pads its embeddings to another size in every model of a family."""
    padded, teacher = load_model(checkpoint), load_model(checkpoint)
    padded.resize_token_embeddings(352, mean_resizing=False)
    padded.save_pretrained(tmp_path)
    copy_tokenizer(checkpoint, tmp_path)
    check_vocabularies(open_checkpoint(tmp_path), open_checkpoint(checkpoint))
    assert build_objective(padded, teacher=teacher, alpha=1.0)(*prompt_masked())["loss_kd"].item() == pytest.approx(0, abs=1e-6)


def _rename_token(tokenizer: dict[str, Any]) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["renamed"] = vocabulary.pop(next(token for token, index in vocabulary.items() if index == 300))


def _swap_merges(tokenizer: dict[str, Any]) -> None:
    merges = tokenizer["model"]["merges"]
    merges[3], merges[4] = merges[4], merges[3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_rename_token, r"token 300 is .* for the student and \('renamed', 300\) for the teacher"),
        (_swap_merges, "merge 3 is"),
        (lambda tokenizer: tokenizer["added_tokens"].pop(), "added token 1 is .* for the student and missing for the teacher"),
        (lambda tokenizer: tokenizer["model"].update(type="WordPiece"), "student's tokenizer is BPE, the teacher's is WordPiece"),
    ],
)
def test_another_vocabulary_is_refused(tmp_path: Path, checkpoint: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    teacher = tiny_checkpoint(tmp_path / "teacher")
    tokenizer = json.loads((teacher / "tokenizer.json").read_text())
    change(tokenizer)
    (teacher / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(Incompatible, match=message) as caught:
        run_distillation(
            checkpoint, teacher, tmp_path / "out", tiny_windows(), settings=SETTINGS, workdir=tmp_path / "work", context=Context()
        )  # fmt: skip
    assert caught.value.key == "teacher"
    assert not (tmp_path / "out").exists()


def test_old_and_new_spellings_of_merges_are_the_same(tmp_path: Path, checkpoint: Path) -> None:
    other = tiny_checkpoint(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = [" ".join(merge) for merge in tokenizer["model"]["merges"]]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    check_vocabularies(open_checkpoint(other), open_checkpoint(checkpoint))


def paired(student: Path, teacher: Path, home: Path, monkeypatch: pytest.MonkeyPatch, **terms: Any) -> dict[int, int]:
    """The pairs of blocks that a distillation by the rule `uniform` compares."""
    found: list[dict[int, int]] = []

    def note(objective: Objective, *_: object, **__: object) -> dict[str, float]:
        found.append(objective.layers)
        return {}

    monkeypatch.setattr("compression.distillation.method.train", note)
    run_distillation(
        student, teacher, home / "out", tiny_windows(), gamma=1.0, feature_layers="uniform", settings=SETTINGS, workdir=home / "work",
        context=Context(), **terms,
    )  # fmt: skip
    return found[0]


def test_blocks_meet_the_ones_they_came_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_checkpoint(tmp_path / "base", layers=6)
    prune_depth(base, tmp_path / "five", DepthSettings(blocks=(4,)), context=Context())
    prune_width(tmp_path / "five", tmp_path / "thin", WidthSettings(keep=0.5, keep_heads=0.5), context=Context())
    prune_depth(tmp_path / "thin", tmp_path / "three", DepthSettings(blocks=(1, 2)), context=Context())  # blocks 0, 3 and 5 of base
    wider = tiny_checkpoint(tmp_path / "wider", layers=6, hidden=32)
    for feature in ("hidden_mse", "attention"):
        assert paired(tmp_path / "three", base, tmp_path, monkeypatch, feature=feature) == {0: 0, 1: 3, 2: 5}
    assert paired(tmp_path / "three", tmp_path / "five", tmp_path, monkeypatch) == {0: 0, 1: 3, 2: 4}
    assert paired(tmp_path / "five", tmp_path / "three", tmp_path, monkeypatch) == {0: 0, 1: 1, 2: 1, 3: 2, 4: 2}  # some are not in there
    assert paired(tmp_path / "three", wider, tmp_path, monkeypatch) == {0: 1, 1: 3, 2: 5}  # another model: by depth


def test_what_depth_pruning_left_alone_is_what_it_was(tmp_path: Path) -> None:
    """The blocks before the first that is gone have the hidden states of the teacher; the next has not."""
    base = tiny_checkpoint(tmp_path / "base", layers=4)
    prune_depth(base, tmp_path / "student", DepthSettings(blocks=(2,)), context=Context())
    kept = read_kept(tmp_path / "student")["model.layers"].tolist()
    for feature in ("hidden_mse", "attention"):
        losses = []
        for pair in enumerate(kept):
            objective = build_objective(
                load_model(tmp_path / "student"), teacher=load_model(base), gamma=1.0, feature=feature, layers=dict([pair])
            )  # fmt: skip
            losses.append(objective(*prompt_masked())["loss_feature"].item())
        assert losses[:2] == [0, 0]
        assert losses[2] > 1e-4


@pytest.mark.parametrize("weights", [{"alpha": -1.0}, {"temperature": 0.0}, {"jsd_beta": 1.0}])
def test_weights_out_of_range(weights: dict[str, float]) -> None:
    with pytest.raises(ValidationError) as caught:
        ObjectiveSettings(**weights)
    assert caught.value.errors()[0]["loc"] == (*weights,)


def test_an_objective_needs_a_term(checkpoint: Path) -> None:
    with pytest.raises(EdgepressError, match="nothing to minimise"):
        build_objective(load_model(checkpoint), teacher=load_model(checkpoint), alpha=0.0)


def test_a_model_that_scales_its_logits_is_refused(checkpoint: Path) -> None:
    model = load_model(checkpoint)
    model.register_forward_hook(lambda module, inputs, output: output.__class__(logits=output.logits / 2))
    with pytest.raises(Incompatible, match="after the output head"):
        build_objective(model, beta=1.0)


def test_students_and_rows_that_cannot_be_trained(tmp_path: Path, checkpoint: Path) -> None:
    def attempt(student: Path, rows: torch.Tensor) -> None:
        run_distillation(student, checkpoint, tmp_path / "out", rows, settings=SETTINGS, workdir=tmp_path / "work", context=Context())

    for token in (320, -1):
        with pytest.raises(UnusableData, match=rf"token {token}, .* only 320 rows; .* tokenize with the tokenizer of the model"):
            attempt(checkpoint, torch.tensor([[2, token]]))
    with pytest.raises(UnusableData, match=r"200 tokens long, .* reads 128 at most"):
        attempt(checkpoint, tiny_windows(2, 200))
    short = tiny_checkpoint(tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 20}))
    with pytest.raises(Incompatible, match="32 tokens long, the teacher .* reads 20"):
        run_distillation(
            checkpoint, short, tmp_path / "out", tiny_windows(), settings=SETTINGS, workdir=tmp_path / "work", context=Context()
        )
    quantized = tiny_checkpoint(tmp_path / "quantized")
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(Incompatible, match="train before quantizing"):
        attempt(quantized, tiny_windows())


def test_what_validation_needs_imports_no_torch() -> None:
    modules = "compression.distillation, compression.training.settings, compression.resumption"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
