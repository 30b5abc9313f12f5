"""Three kills of a micro recipe, and that the drill finds what it looks for. Thirty of the demo: `make drill`."""

from pathlib import Path

import pytest
from rich.console import Console

from tests.drill.__main__ import part, show
from tests.drill.kills import Report, drill
from tests.drill.place import Place, inspect
from tests.flows.recipes import recipe

STAGES = """\
  pruned: {uses: prune.width, keep: 0.5}
  distilled: {uses: distill, steps: 60, batch_size: 4, save_every: 10}
"""


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("drill")


@pytest.fixture(scope="module")
def report(folder: Path, checkpoint: Path) -> Report:
    (folder / "micro.yaml").write_text(f"name: micro\n{recipe(checkpoint, STAGES)}")
    return drill(str(folder / "micro.yaml"), [], folder, kills=3, seed=1, say=print)


def test_three_kills_change_no_bytes(report: Report) -> None:
    assert report.faults == []
    assert sorted(moment.whom for moment, _ in report.kills) == ["child", "command", "command"]
    missed = {"committing", "measuring", "training"} - {moment.where for moment, _ in report.kills}
    assert len(missed) == sum(moment.where == "starting" for moment, _ in report.kills) and bool(missed) == bool(report.late)
    assert sum(report.commands.values()) >= 3 and len(report.checks) == 9


def test_the_report_is_one_table(report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    show(report, Console(width=140))
    printed = capsys.readouterr().out
    assert all(fragment in printed for fragment in ("all is well", "kills in training, of the command", "store verifies clean"))
    show(Report(1.0, faults=["store verifies clean: entry 1234"], checks=[("store verifies clean", "2 entries")]), Console(width=140))
    printed = capsys.readouterr().out
    assert all(fragment in printed for fragment in ("1 faults", "no: 2 entries", "fault: store verifies clean: entry 1234"))
    assert "| kills in training, of the command | 1 |" in part(report, 1)


def test_the_drill_finds_faults(report: Report, folder: Path) -> None:
    """A byte that differs, a link that is gone, scratch that stays."""
    calm, hurt = (Place(folder / name, "micro.yaml", []) for name in ("undisturbed", "killed"))
    model = hurt.folder / "outputs" / "micro" / "pruned" / "model.safetensors"
    (hurt.work / "left").mkdir()
    (hurt.folder / "outputs" / "micro" / "distilled").unlink()
    whole = model.read_bytes()
    model.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    wrong = {what for what, _, faults in inspect(calm, hurt) if faults}
    assert wrong == {
        "artifacts byte-identical to the undisturbed run", "every result linked by its name", "store verifies clean", "no scratch left in the store"
    }  # fmt: skip
