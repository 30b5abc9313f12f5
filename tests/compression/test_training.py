"""The loop against a plain torch loop, and against kill -9."""

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional

from compression.checkpoints.loading import load_model
from compression.context import Context
from compression.errors import EdgepressError, UnusableData
from compression.training import TrainingSettings
from compression.training.curve import Curve
from tests.tiny import tiny_windows
from tests.trainings import build_objective, run_training

SETTINGS = TrainingSettings(
    steps=10, batch_size=4, learning_rate=1e-2, warmup_ratio=0.2, weight_decay=0.1, save_every=3, group_by_length=False
)


class Toy(nn.Module):
    """A bigram model: small enough to train in milliseconds, with dropout, so that the random state matters."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.dropout = dropout
        self.embedding = nn.Embedding.from_pretrained(torch.randn(320, 16, generator=torch.Generator().manual_seed(0)), freeze=False)
        self.head = nn.Linear(16, 320, bias=False)
        nn.init.normal_(self.head.weight, std=0.1, generator=torch.Generator().manual_seed(1))

    def forward(self, input_ids: torch.Tensor, loss_mask: torch.Tensor, count: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(functional.dropout(self.embedding(input_ids[:, :-1]), self.dropout, self.training))
        losses = functional.cross_entropy(logits.float().flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none")
        loss = (losses * loss_mask[:, 1:].flatten()).sum() / count
        return {"loss": loss, "loss_task": loss}


def run(
    model: nn.Module, workdir: Path, *, settings: TrainingSettings = SETTINGS, mask: torch.Tensor | None = None,
    origin: Mapping[str, Any] | None = None, **context: object,
) -> dict[str, float]:  # fmt: skip
    return run_training(
        model, tiny_windows(11), mask=mask, settings=settings, origin=origin or {}, workdir=workdir, context=Context(seed=5, **context), name="toy"
    )  # fmt: skip


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def dying(step: int) -> Callable[[int, int, str], None]:
    def progress(done: int, total: int, what: str) -> None:
        if done == step:
            raise InterruptedError

    return progress


def some_mask() -> torch.Tensor:
    return torch.rand(11, 32, generator=torch.Generator().manual_seed(3)) < torch.linspace(0.1, 1, 11)[:, None]


def test_is_a_plain_loop_of_adamw_with_cosine_decay(tmp_path: Path) -> None:
    ours, plain, rows, mask = Toy(), Toy(), tiny_windows(11), some_mask()
    run(ours, tmp_path, mask=mask)
    optimizer = torch.optim.AdamW(plain.parameters(), weight_decay=0.1)
    generator = torch.Generator().manual_seed(5)
    order = torch.cat([torch.randperm(11, generator=generator) for _ in range(4)]).split(4)
    for step in range(10):
        rate = step / 2 if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / 8))
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * rate
        batch = order[step]
        optimizer.zero_grad()
        plain(rows[batch], mask[batch], mask[batch][:, 1:].sum())["loss"].backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
    torch.testing.assert_close(weights(ours), weights(plain), rtol=1e-5, atol=1e-6)
    assert (weights(ours) - weights(Toy())).abs().max() > 1e-2


def test_accumulation_is_a_larger_batch(tmp_path: Path) -> None:
    """Also where the rows of a batch hold unequal numbers of targets."""
    large, small = Toy(), Toy()
    run(large, tmp_path / "large", mask=some_mask())
    run(
        small,
        tmp_path / "small",
        mask=some_mask(),
        settings=SETTINGS.model_copy(update={"batch_size": 2, "gradient_accumulation": 2}),
    )
    torch.testing.assert_close(weights(large), weights(small), rtol=1e-4, atol=1e-6)


def test_bfloat16_multiplies_in_bfloat16_and_keeps_float32_weights(tmp_path: Path) -> None:
    seen = set()
    model = Toy()
    model.head.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    run(model, tmp_path, settings=SETTINGS.model_copy(update={"precision": "bfloat16"}))
    assert seen == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("died_at", [1, 3, 5, 10])
def test_continues_to_the_same_bits_and_the_same_curve(tmp_path: Path, died_at: int) -> None:
    curves: list[dict[int, dict[str, float]]] = [{}, {}]
    whole, second = Toy(dropout=0.3), Toy(dropout=0.3)
    metrics = run(whole, tmp_path / "whole", metrics=lambda values, step: curves[0].update({step: dict(values)}))
    with pytest.raises(InterruptedError):
        run(
            Toy(dropout=0.3),
            tmp_path / "dies",
            progress=dying(died_at),
            metrics=lambda values, step: curves[1].update({step: dict(values)}),
        )
    resumed = run(second, tmp_path / "dies", metrics=lambda values, step: curves[1].update({step: dict(values)}))
    assert resumed["resumed_from_step"] == (died_at - 1) // 3 * 3
    assert torch.equal(weights(whole), weights(second))
    assert list(curves[0]) == list(range(1, 11))
    for step, values in curves[0].items():
        for name in ("loss", "loss_task", "learning_rate"):
            assert curves[1][step][name] == values[name], (step, name)
    assert resumed["loss"] == metrics["loss"]
    assert metrics["steps"] == 10
    again = run(Toy(dropout=0.3), tmp_path / "dies")
    assert again["resumed_from_step"] == 10
    assert again["loss"] == metrics["loss"]


SCRIPT = """
import json, os, signal, sys
from pathlib import Path
from typing import Any
import torch
from compression.context import Context
from compression.checkpoints.loading import load_model
from compression.training.curve import Curve
from compression.training import TrainingSettings
from safetensors.torch import save_file
from tests.tiny import tiny_windows
from tests.trainings import build_objective, run_training

torch.set_num_threads(1)

def attempt(checkpoint, workdir, die_at_step, die_at_sync):
    syncs, fsync = 0, os.fsync

    def counting(descriptor):
        nonlocal syncs
        syncs += 1
        if syncs == die_at_sync:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    def progress(done, total, what):
        if done == die_at_step:
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = counting
    student, teacher = load_model(checkpoint), load_model(checkpoint)
    with torch.no_grad():
        student.model.layers[0].mlp.up_proj.weight[::2] = 0
    objective = build_objective(student, teacher=teacher, alpha=1.0, gamma=0.1, temperature=2.0, layers={0: 0})
    settings = TrainingSettings(steps=9, batch_size=2, learning_rate=1e-3, save_every=2)
    run_training(objective, tiny_windows(7), mask=None, settings=settings, origin={}, workdir=workdir, context=Context(progress=progress), name="distil")
    save_file({name: tensor.clone() for name, tensor in objective.state_dict().items()}, f"{workdir}.safetensors")

found = []
for workdir, step, sync in json.loads(sys.argv[2]):
    child = os.fork()  # a process of its own for each attempt, which does not import torch once more
    if child == 0:
        attempt(Path(sys.argv[1]), Path(workdir), step, sync)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    found.append([status, sorted(path.name for path in Path(workdir).iterdir())])
print(json.dumps(found))
"""


@pytest.mark.slow
def test_survives_kill_9_at_a_step_and_in_the_middle_of_writing(tmp_path: Path, checkpoint: Path) -> None:
    """Real processes: one that is never disturbed, and one killed twice and left to finish, which ends in the same bits."""
    whole, killed = str(tmp_path / "whole"), str(tmp_path / "killed")
    attempts = json.dumps([[whole, 0, 0], [killed, 5, 0], [killed, 0, 3], [killed, 0, 0]])
    ours = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", SCRIPT, checkpoint, attempts]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ours)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [
        [0, ["checkpoint-8", "checkpoint-9"]],
        [-signal.SIGKILL, ["checkpoint-2", "checkpoint-4"]],
        [-signal.SIGKILL, [".partial-checkpoint-6", "checkpoint-2", "checkpoint-4"]],
        [0, ["checkpoint-8", "checkpoint-9"]],
    ]
    assert Path(f"{killed}.safetensors").read_bytes() == Path(f"{whole}.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["marker", "file", "flipped"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_used(tmp_path: Path, damage: str) -> None:
    whole, second = Toy(dropout=0.3), Toy(dropout=0.3)
    run(whole, tmp_path / "whole")
    with pytest.raises(InterruptedError):
        run(Toy(dropout=0.3), tmp_path / "dies", progress=dying(8))
    newest = tmp_path / "dies" / "checkpoint-6"
    if damage == "marker":
        (newest / "complete.json").unlink()
    elif damage == "file":
        (newest / "rng_state.pth").unlink()
    else:
        content = bytearray((newest / "trainable.pt").read_bytes())
        content[len(content) // 2] ^= 1
        (newest / "trainable.pt").write_bytes(content)
    warnings: list[str] = []
    assert run(second, tmp_path / "dies", warn=warnings.append)["resumed_from_step"] == 3
    assert len(warnings) == 1
    assert str(newest) in warnings[0]
    assert torch.equal(weights(whole), weights(second))


def test_the_checkpoints_of_another_training_are_refused(tmp_path: Path) -> None:
    run(Toy(), tmp_path)
    with pytest.raises(EdgepressError, match="with other settings"):
        run(Toy(), tmp_path, settings=SETTINGS.model_copy(update={"learning_rate": 2e-2}))
    with pytest.raises(EdgepressError, match="with other settings"):
        run(Toy(), tmp_path, mask=some_mask())
    with pytest.raises(EdgepressError, match="another method, on another model"):
        run(Toy(), tmp_path, origin={"method": "another"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-9"]
    assert set(json.loads((tmp_path / "checkpoint-10" / "complete.json").read_text())["files"]) >= {
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
    }


def test_is_quiet_and_leaves_the_global_random_state_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = Toy(dropout=0.1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    calls: list[tuple[int, int, str]] = []
    run(model, tmp_path, progress=lambda *call: calls.append(call))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()
    assert before[2] == random.getstate()
    assert [call[:2] for call in calls] == [(step, 10) for step in range(1, 11)]
    assert re.fullmatch(r"toy: loss 5\.\d+, [\d,]+ tokens/s", calls[-1][2])
    assert capfd.readouterr() == ("", "")


def test_the_seed_decides_the_weights(tmp_path: Path) -> None:
    models = [Toy(dropout=0.1) for _ in range(3)]
    for index, seed in enumerate((0, 0, 1)):
        run_training(
            models[index],
            tiny_windows(11),
            mask=None,
            settings=SETTINGS,
            origin={},
            workdir=tmp_path / str(index),
            context=Context(seed=seed),
            name="toy",
        )
    assert torch.equal(weights(models[0]), weights(models[1]))
    assert not torch.equal(weights(models[0]), weights(models[2]))


def test_a_loss_that_is_no_number_stops_the_training_before_it_is_saved(tmp_path: Path) -> None:
    class Diverging(Toy):
        def forward(self, input_ids: torch.Tensor, loss_mask: torch.Tensor, count: torch.Tensor) -> dict[str, torch.Tensor]:
            terms = super().forward(input_ids, loss_mask, count)
            return {name: value / (self.embedding.weight.detach()[0, 0] - self.start) for name, value in terms.items()}

    model = Diverging()
    model.start = model.embedding.weight[0, 0].item()
    with pytest.raises(EdgepressError, match="no longer finite at step 1 of 10") as caught:
        run(model, tmp_path)
    assert caught.value.key == "learning_rate"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("rows", "mask", "message"),
    [
        (torch.zeros(4, 8), None, "int64"),
        (torch.zeros(8, dtype=torch.int64), None, r"\[8\]"),
        (tiny_windows(4), torch.ones(4, 31), "must agree"),
        (tiny_windows(4), torch.zeros(4, 32), "no token to learn from"),
    ],
)
def test_unusable_rows(tmp_path: Path, rows: torch.Tensor, mask: torch.Tensor | None, message: str) -> None:
    with pytest.raises(UnusableData, match=message):
        run_training(Toy(), rows, mask=mask, settings=SETTINGS, origin={}, workdir=tmp_path, context=Context(), name="toy")


@pytest.mark.parametrize(
    ("key", "value"),
    [("steps", 0), ("batch_size", 0), ("learning_rate", -1.0), ("warmup_ratio", 1.0), ("precision", "float8"), ("save_every", 0)],
)  # fmt: skip
def test_settings_out_of_range(key: str, value: object) -> None:
    with pytest.raises(ValidationError) as caught:
        TrainingSettings(**{key: value})
    assert caught.value.errors()[0]["loc"] == (key,)


def test_a_real_model_learns_its_rows(tmp_path: Path, checkpoint: Path) -> None:
    curve: list[float] = []
    settings = TrainingSettings(steps=30, batch_size=4, learning_rate=3e-3)
    context = Context(metrics=lambda values, step: curve.append(values["loss"]))
    run_training(
        build_objective(load_model(checkpoint), beta=1.0),
        tiny_windows(4),
        mask=None,
        settings=settings,
        origin={},
        workdir=tmp_path,
        context=context,
        name="fit",
    )
    assert curve[-1] < 0.5 * curve[0]


def test_padding_is_no_token_of_the_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    add = Curve.add
    monkeypatch.setattr(Curve, "add", lambda curve, terms, tokens: (counted.append(int(tokens)), add(curve, terms, tokens))[1])
    lengths = torch.tensor([32, 9, 4, 2])
    mask = (torch.arange(32) < lengths[:, None]) & (torch.arange(32) > 0)
    settings = TrainingSettings(steps=3, batch_size=4, learning_rate=1e-3, group_by_length=False)
    metrics = run_training(
        Toy(), tiny_windows(4), mask=mask, settings=settings, origin={}, workdir=tmp_path, context=Context(), name="toy"
    )  # fmt: skip
    assert counted == [int(lengths.sum())] * 3
    assert metrics["training_tokens_per_second"] > 0
