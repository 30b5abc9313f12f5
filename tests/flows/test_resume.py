"""Which run is resumed, and which parts of a recipe are run or computed again: `edgepress runs`, `resume`, `run --from --only --force`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from compression.errors import EdgepressError
from flows.planning import Plan, check_disk, load_recipe, make_plan, select
from flows.run.pipeline import unpublish_descendants
from tasks.measurement.gates import Verdict
from tasks.planned_stage import Result
from tasks.store.journal import Run, RunBase, RunStage, journal, read_runs
from tasks.store.store import Store, publish
from tests.flows.recipes import STAGES, edgepress, recipe

SWEPT = """\
  pruned: {uses: prune.width, keep: 0.5}
  distilled: {uses: distill, steps: 120, batch_size: 2, save_every: 10}
  rtn: {uses: quantize.rtn, group_size: 32}
"""
MATRIX = "matrix: {rtn.bits: [2, 8]}\n"
GRID = "matrix: {rtn.bits: [2, 8], rtn.group_size: [16, 32]}\n"
FIRST, SECOND = "rtn@bits=2", "rtn@bits=8"
STAGE_NAMES = ["pruned", "distilled", FIRST, SECOND]


# --- which stages run, and which again ---


@pytest.fixture
def plan(tmp_path: Path, checkpoint: Path) -> Callable[..., Plan]:
    def make(stages: str = STAGES, rest: str = "") -> Plan:
        file = tmp_path / "micro.yaml"
        file.write_text(recipe(checkpoint, stages, rest))
        return make_plan(load_recipe(file), Store(tmp_path / "store"))

    return make


def names(plan: Plan) -> list[str]:
    return [stage.name for stage in plan.stages]


def recomputed(plan: Plan) -> list[str]:
    return [stage.name for stage in plan.stages if stage.recompute]


def test_without_options_the_plan_is_unchanged(plan: Callable[..., Plan]) -> None:
    assert select(plan()) == plan()


def test_only_keeps_stages_and_their_ancestors(plan: Callable[..., Plan]) -> None:
    full = plan()
    assert names(select(full, only=["onnx"])) == ["base", "pruned", "distilled", "onnx"]
    for only in (["onnx,gptq"], ["gptq", "onnx"], ["onnx, gptq"]):
        cut = select(full, only=only)
        assert names(cut) == ["base", "pruned", "distilled", "gptq", "onnx"] and recomputed(cut) == []
        assert {node.name for node in cut.parsed.nodes} == {*names(cut)} - {"base"} and cut.only == tuple(only)


def test_from_includes_descendants_and_force_does_not(plan: Callable[..., Plan]) -> None:
    assert recomputed(select(plan(), start_from=["distilled"])) == ["distilled", "gptq", "gguf", "onnx"]
    assert recomputed(select(plan(), start_from=["onnx"])) == ["onnx"]
    assert recomputed(select(plan(), force=["distilled", "pruned"])) == ["pruned", "distilled"]
    assert recomputed(select(plan(), start_from=["gptq"], force=["pruned"], only=["gguf"])) == ["pruned", "gptq", "gguf"]


def test_a_stage_name_means_all_its_copies(plan: Callable[..., Plan]) -> None:
    swept = plan(SWEPT, GRID)
    copies = [f"rtn@bits={bits},group_size={group}" for bits in (2, 8) for group in (16, 32)]
    assert recomputed(select(swept, force=["rtn"])) == copies
    assert recomputed(select(swept, force=[f"{copies[1]},pruned,{copies[2]}"])) == ["pruned", copies[1], copies[2]]
    cut = select(swept, only=[copies[3]])
    assert names(cut) == ["base", "pruned", "distilled", copies[3]]
    assert [branch.name for branch in cut.parsed.branches] == ["bits=8,group_size=32"]
    assert select(swept, only=["distilled"]).parsed.branches == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": ["gptq,prund"]}, "--only: there is no stage 'prund'; did you mean 'pruned'?; stages: pruned, distilled, rtn"),
        ({"start_from": [""]}, "--from: there is no stage ''"),
        ({"force": ["base"]}, "--force: there is no stage 'base'"),
        ({"force": ["rtn@bits=2,group_size=61"]}, "no stage 'rtn@bits=2,group_size=61'; did you mean 'rtn@bits=2,group_size=16'?"),
        ({"only": ["pruned"], "start_from": ["distilled"]}, "--from: distilled is not among what --only leaves: pruned"),
    ],
)
def test_unknown_and_excluded_stages_are_refused(plan: Callable[..., Plan], options: dict[str, Any], message: str) -> None:
    stages = SWEPT + "  gptq: {uses: quantize.gptq, group_size: 32, needs: distilled}\n"
    with pytest.raises(EdgepressError) as caught:
        select(plan(stages, GRID), **options)
    assert message in str(caught.value).replace(", gptq", "")


@pytest.mark.parametrize(
    ("stages", "rest", "only", "outcomes", "lost"),
    [
        (STAGES, "", [], {"gptq": "FAIL"}, {"gguf"}),
        (STAGES, "", ["pruned"], {"pruned": "FAIL"}, {"distilled", "gptq", "gguf", "onnx"}),
        (STAGES, "", [], {"base": "PASS", "pruned": "FAIL PASS"}, {"distilled", "gptq", "gguf", "onnx"}),
        (STAGES, "", [], {"distilled": "", "pruned": "PASS WARN"}, set()),  # distilled crashed before it was judged
        (SWEPT + "  gguf: {uses: export.gguf, type: bf16, needs: rtn}\n", MATRIX, [], {FIRST: "FAIL"}, {"gguf@bits=2"}),
    ],
)
def test_a_broken_gate_unpublishes_earlier_descendants(
    plan: Callable[..., Plan], tmp_path: Path, stages: str, rest: str, only: list[str], outcomes: dict[str, str], lost: set[str]
) -> None:
    full = plan(stages, rest)
    everything = set(full.by_name) - {"base"}
    for name in everything:
        publish(tmp_path, tmp_path / "links", "micro", name)
    results = {
        name: Result(name, "", [], "Failed", verdicts=[Verdict("perplexity", cast("Any", one), "") for one in verdicts.split()])
        for name, verdicts in outcomes.items()
    }
    unpublish_descendants(select(full, only=only), results, tmp_path / "links")
    assert everything - {link.name for link in (tmp_path / "links" / "micro").iterdir()} == lost


def test_the_disk_must_hold_recomputed_stages(plan: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "has", lambda *_: True)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10))
    store = Store(tmp_path / "store")
    check_disk(plan(), store)
    with pytest.raises(EdgepressError, match="this plan needs about"):
        check_disk(select(plan(), force=["distilled"]), store)


def test_an_unknown_stage_is_refused_before_anything_runs(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("micro.yaml").write_text(recipe(checkpoint))
    code, out, err = edgepress(["run", "micro.yaml", "--force", "prund"], capfd)
    assert code == 2 and out == "" and "did you mean 'pruned'?" in err and not Path("mlflow.db").exists()
    assert read_runs(Store(Path(".edgepress"))) == []


# --- runs in the journal, listed and chosen ---


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EDGEPRESS_STORE", raising=False)
    return Store(tmp_path / ".edgepress")


@pytest.fixture
def write(store: Store, checkpoint: Path, tmp_path: Path) -> Callable[..., Run]:
    """write(state, ...): the journal of a run of `micro.yaml` that ended so."""

    def written(
        state: str = "Completed", recipe_name: str = "micro", states: tuple[str, ...] = ("Completed", "Failed"), **more: Any
    ) -> Run:
        stages = tuple(
            RunStage(
                name=name, uses="prune.width", identity=name * 8, state=of, reason="too [narrow]" if of == "Failed" else "", seconds=2.5
            )
            for name, of in zip(("pruned", "distilled"), states, strict=True)
        )
        run = Run(
            recipe=recipe_name, file=str(tmp_path / "micro.yaml"), text=recipe(checkpoint, SWEPT),
            base=RunBase(source="x", identity="b", content="b"), stages=stages,
            **{"directory": str(tmp_path), "outputs": str(tmp_path / "links"), **more},
        )  # fmt: skip
        with journal(store, run) as opened:
            opened.end("Completed" if state == "Crashed" else state)  # type: ignore[arg-type]
        if state == "Crashed":  # as if it had been killed
            document = opened.run.model_copy(update={"state": "Running", "ended": None, "stages": stages})
            (store.root / "runs" / f"{opened.run.run}.json").write_text(document.model_dump_json())
        return opened.run

    return written


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Plan, Path, Run]]:
    """What `resume` executes: (plan, outputs, resumed run)."""
    calls: list[tuple[Plan, Path, Run]] = []
    monkeypatch.setattr("flows.cli.run.execute_plan", lambda plan, store, outputs, resumes: calls.append((plan, outputs, resumes)))
    return calls


def edgepress_output(capfd: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    ended, out, err = edgepress(arguments, capfd)
    assert ended == code and "Traceback" not in err, err
    return err if code else out


def test_runs_lists_states_and_durations(write: Callable[..., Run], capfd: pytest.CaptureFixture[str]) -> None:
    write("Crashed", states=("Completed", "Running"))
    write("Failed", resumes="micro-1")
    write(recipe_name="other", states=("Cached", "Completed"))
    lines = {line.split("│")[1].strip(): line for line in edgepress_output(capfd, "runs").splitlines() if "│" in line}
    assert all(word in lines["micro-1"] for word in ("Crashed", "1/2", "micro.yaml"))
    assert all(word in lines["micro-2"] for word in ("Failed", "1/2", "0 s", "micro-1"))
    assert all(word in lines["other-3"] for word in ("Completed", "2/2"))
    assert [run["run"] for run in json.loads(edgepress_output(capfd, "runs", "--recipe", "micro", "--json"))["runs"]] == [
        "micro-1",
        "micro-2",
    ]


def test_runs_lists_the_stages_of_a_run(write: Callable[..., Run], capfd: pytest.CaptureFixture[str]) -> None:
    write("Crashed", states=("Failed", "Running"))
    table = edgepress_output(capfd, "runs", "micro-1")
    assert all(fragment in table for fragment in ("micro-1: crashed", "too [narrow]", "2.5", "prunedpruned "))
    run = json.loads(edgepress_output(capfd, "runs", "micro-1", "--json"))
    assert (
        run["state"] == "Crashed" and [stage["state"] for stage in run["stages"]] == ["Failed", "Crashed"] and "prune.width" in run["text"]
    )
    assert "there is no run 'micro-7'" in edgepress_output(capfd, "runs", "micro-7", code=2)


@pytest.mark.parametrize("command", ["runs", "resume"])
def test_an_absent_store_is_refused(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "there is no store in absent" in edgepress_output(capfd, command, "--store", "absent", code=2)


def test_resume_takes_the_last_incomplete_run(
    write: Callable[..., Run], executed: list[Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "micro.yaml").write_text("something: else\n")
    write()
    write("Interrupted", overrides=("stages.pruned.keep=0.25",), only=("distilled",), again=("pruned", "distilled"))
    write(recipe_name="other")
    write(outputs=str(tmp_path / "other links"))
    out = edgepress_output(capfd, "resume")
    assert "resuming micro-2 (interrupted)" in out and "micro.yaml has changed" in out
    ((plan, outputs, resumed),) = executed
    assert (resumed.run, outputs) == ("micro-2", tmp_path / "links")
    assert names(plan) == ["base", "pruned", "distilled"] and recomputed(plan) == ["distilled"]  # pruned was computed again already
    stage = plan.by_name["pruned"].definition
    assert stage is not None and stage.model_dump()["keep"] == 0.25
    assert "these are new: pruned, distilled" in out  # the journal of this test has identities of no plan


def test_a_missing_recipe_is_noted_a_missing_directory_refused(
    write: Callable[..., Run], executed: list[Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write("Failed")
    assert "micro.yaml cannot be read any more" in edgepress_output(capfd, "resume")
    write("Failed", directory=str(tmp_path / "gone"))
    assert "not a directory" in edgepress_output(capfd, "resume", code=2)
    assert len(executed) == 1


def test_completed_runs_are_not_resumed(write: Callable[..., Run], executed: list[Any], capfd: pytest.CaptureFixture[str]) -> None:
    assert "no run in this store is incomplete" in edgepress_output(capfd, "resume")
    write("Crashed")
    write(resumes="micro-1")
    assert "no run in this store is incomplete" in edgepress_output(capfd, "resume")
    assert edgepress_output(capfd, "resume", "micro-1") == "micro-2 resumed micro-1\nnothing to do: micro-2 completed\n"
    assert "there is no run 'micro-9'" in edgepress_output(capfd, "resume", "micro-9", code=2)
    assert executed == []


def test_an_overtaken_run_is_resumed_only_by_name(
    write: Callable[..., Run], executed: list[Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write("Crashed", states=("Completed", "Running"))
    write("Failed", recipe_name="other")
    write("Failed", resumes="micro-1")
    write()  # with a mended recipe
    assert "resuming other-2 (failed)" in edgepress_output(capfd, "resume")
    write(recipe_name="other", only=("distilled",))
    assert "resuming other-2 (failed)" in edgepress_output(capfd, "resume")  # only a part of it is newer
    write(recipe_name="other")
    assert edgepress_output(capfd, "resume") == "nothing to do: micro-3 was overtaken by micro-4; name it to resume it\n"
    assert "resuming micro-3 (failed)" in edgepress_output(capfd, "resume", "micro-1")
    write("Failed")
    assert "resuming micro-7 (failed)" in edgepress_output(capfd, "resume")
    assert [resumed.run for _, _, resumed in executed] == ["other-2", "other-2", "micro-3", "micro-7"]


def test_a_running_run_is_not_resumed(
    store: Store, write: Callable[..., Run], executed: list[Any], capfd: pytest.CaptureFixture[str]
) -> None:
    ended = write("Failed")
    with journal(store, ended.model_copy(update={"state": "Running", "ended": None, "resumes": ended.run})) as running:
        assert "micro-2 is still running" in edgepress_output(capfd, "resume", "micro-2", code=2)
        assert "micro-2 is still running" in edgepress_output(capfd, "resume", "micro-1", code=2)
        assert edgepress_output(capfd, "resume") == "nothing to do: micro-2 still running\n"
        with pytest.raises(EdgepressError, match="micro-2 .*micro-1"), journal(store, running.run.model_copy()):
            pass
        with pytest.raises(EdgepressError, match="still running"), journal(store, ended.model_copy(update={"resumes": "micro-2"})):
            pass
        running.end("Completed")
    assert [run.run for run in read_runs(store)] == ["micro-1", "micro-2"] and executed == []
