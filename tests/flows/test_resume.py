"""Going on with runs, and running parts of a recipe or parts again: `edgepress runs`, `resume`, `run --from --only --force`."""

import json
import shutil
import signal
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
from mlflow import MlflowClient

from compression.errors import EdgepressError
from flows.planning import Plan, check_disk, load_recipe, make_plan, select
from flows.run.pipeline import unpublish_descendants
from tasks.measurement.gates import Verdict
from tasks.planned_stage import Result
from tasks.store.journal import Run, RunBase, RunStage, current_state, journal, read_run, read_runs
from tasks.store.store import Store, publish
from tests.flows.recipes import STAGES, edgepress, recipe
from tests.flows.test_pipeline import SAFE, Finished, Interrupted, Workshop
from tests.waiting import PATIENCE

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
    def made(stages: str = STAGES, rest: str = "") -> Plan:
        file = tmp_path / "micro.yaml"
        file.write_text(recipe(checkpoint, stages, rest))
        return make_plan(load_recipe(file), Store(tmp_path / "store"))

    return made


def names(plan: Plan) -> list[str]:
    return [task.name for task in plan.stages]


def again(plan: Plan) -> list[str]:
    return [task.name for task in plan.stages if task.recompute]


def test_without_options_a_plan_stays_as_it_is(plan: Callable[..., Plan]) -> None:
    assert select(plan()) == plan()


def test_only_keeps_stages_and_their_ancestors(plan: Callable[..., Plan]) -> None:
    whole = plan()
    assert names(select(whole, only=["onnx"])) == ["base", "pruned", "distilled", "onnx"]
    for words in (["onnx,gptq"], ["gptq", "onnx"], ["onnx, gptq"]):
        cut = select(whole, only=words)
        assert names(cut) == ["base", "pruned", "distilled", "gptq", "onnx"] and again(cut) == []
        assert {node.name for node in cut.parsed.nodes} == {*names(cut)} - {"base"} and cut.only == tuple(words)


def test_from_takes_what_descends_with_it_and_force_does_not(plan: Callable[..., Plan]) -> None:
    assert again(select(plan(), start_from=["distilled"])) == ["distilled", "gptq", "gguf", "onnx"]
    assert again(select(plan(), start_from=["onnx"])) == ["onnx"]
    assert again(select(plan(), force=["distilled", "pruned"])) == ["pruned", "distilled"]
    assert again(select(plan(), start_from=["gptq"], force=["pruned"], only=["gguf"])) == ["pruned", "gptq", "gguf"]


def test_the_name_of_a_stage_means_all_its_copies(plan: Callable[..., Plan]) -> None:
    swept = plan(SWEPT, GRID)
    copies = [f"rtn@bits={bits},group_size={group}" for bits in (2, 8) for group in (16, 32)]
    assert again(select(swept, force=["rtn"])) == copies
    assert again(select(swept, force=[f"{copies[1]},pruned,{copies[2]}"])) == ["pruned", copies[1], copies[2]]
    cut = select(swept, only=[copies[3]])
    assert names(cut) == ["base", "pruned", "distilled", copies[3]]
    assert [branch.name for branch in cut.parsed.branches] == ["bits=8,group_size=32"]
    assert select(swept, only=["distilled"]).parsed.branches == ()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"only": ["gptq,prund"]}, "--only: there is no stage 'prund'; did you mean 'pruned'?; stages: pruned, distilled, rtn"),
        ({"start_from": [""]}, "--from: there is no stage ''"),
        ({"force": ["base"]}, "--force: there is no stage 'base'"),
        ({"force": ["rtn@bits=2,group_size=61"]}, "no stage 'rtn@bits=2,group_size=61'; did you mean 'rtn@bits=2,group_size=16'?"),
        ({"only": ["pruned"], "start_from": ["distilled"]}, "--from: distilled is not among what --only leaves: pruned"),
    ],
)
def test_names_that_cannot_be_meant_are_refused(plan: Callable[..., Plan], options: dict[str, Any], words: str) -> None:
    stages = SWEPT + "  gptq: {uses: quantize.gptq, group_size: 32, needs: distilled}\n"
    with pytest.raises(EdgepressError) as caught:
        select(plan(stages, GRID), **options)
    assert words in str(caught.value).replace(", gptq", "")


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
def test_what_earlier_runs_made_of_a_stage_that_breaks_its_gate_loses_its_link(
    plan: Callable[..., Plan], tmp_path: Path, stages: str, rest: str, only: list[str], outcomes: dict[str, str], lost: set[str]
) -> None:
    whole = plan(stages, rest)
    everything = set(whole.by_name) - {"base"}
    for name in everything:
        publish(tmp_path, tmp_path / "links", "micro", name)
    results = {
        name: Result(name, "", [], "Failed", verdicts=[Verdict("perplexity", cast("Any", one), "") for one in told.split()])
        for name, told in outcomes.items()
    }
    unpublish_descendants(select(whole, only=only), results, tmp_path / "links")
    assert everything - {link.name for link in (tmp_path / "links" / "micro").iterdir()} == lost


def test_the_disk_must_hold_what_is_computed_again(plan: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "has", lambda *_: True)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10))
    store = Store(tmp_path / "store")
    check_disk(plan(), store)
    with pytest.raises(EdgepressError, match="this plan needs about"):
        check_disk(select(plan(), force=["distilled"]), store)


def test_an_unknown_stage_is_told_before_anything_runs(
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
def carried(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Plan, Path, Run]]:
    """What `resume` would have run."""
    calls: list[tuple[Plan, Path, Run]] = []
    monkeypatch.setattr("flows.cli.run.execute_plan", lambda plan, store, outputs, resumes: calls.append((plan, outputs, resumes)))
    return calls


def ask(capfd: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    ended, out, err = edgepress(arguments, capfd)
    assert ended == code and "Traceback" not in err, err
    return err if code else out


def test_runs_are_listed_with_how_they_ended(write: Callable[..., Run], capfd: pytest.CaptureFixture[str]) -> None:
    write("Crashed", states=("Completed", "Running"))
    write("Failed", resumes="micro-1")
    write(recipe_name="other", states=("Cached", "Completed"))
    lines = {line.split("│")[1].strip(): line for line in ask(capfd, "runs").splitlines() if "│" in line}
    assert all(word in lines["micro-1"] for word in ("Crashed", "1/2", "micro.yaml"))
    assert all(word in lines["micro-2"] for word in ("Failed", "1/2", "0 s", "micro-1"))
    assert all(word in lines["other-3"] for word in ("Completed", "2/2"))
    assert [run["run"] for run in json.loads(ask(capfd, "runs", "--recipe", "micro", "--json"))["runs"]] == ["micro-1", "micro-2"]


def test_the_stages_of_a_run_are_listed(write: Callable[..., Run], capfd: pytest.CaptureFixture[str]) -> None:
    write("Crashed", states=("Failed", "Running"))
    table = ask(capfd, "runs", "micro-1")
    assert all(words in table for words in ("micro-1: crashed", "too [narrow]", "2.5", "prunedpruned "))
    told = json.loads(ask(capfd, "runs", "micro-1", "--json"))
    assert (
        told["state"] == "Crashed"
        and [stage["state"] for stage in told["stages"]] == ["Failed", "Crashed"]
        and "prune.width" in told["text"]
    )
    assert "there is no run 'micro-7'" in ask(capfd, "runs", "micro-7", code=2)


@pytest.mark.parametrize("command", ["runs", "resume"])
def test_there_must_be_a_store(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert "there is no store in absent" in ask(capfd, command, "--store", "absent", code=2)


def test_the_last_run_that_did_not_complete_is_resumed(
    write: Callable[..., Run], carried: list[Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "micro.yaml").write_text("something: else\n")
    write()
    write("Interrupted", overrides=("stages.pruned.keep=0.25",), only=("distilled",), again=("pruned", "distilled"))
    write(recipe_name="other")
    write(outputs=str(tmp_path / "other links"))
    told = ask(capfd, "resume")
    assert "resuming micro-2 (interrupted)" in told and "micro.yaml has changed" in told
    ((plan, outputs, resumed),) = carried
    assert (resumed.run, outputs) == ("micro-2", tmp_path / "links")
    assert names(plan) == ["base", "pruned", "distilled"] and again(plan) == ["distilled"]  # pruned was computed again already
    stage = plan.by_name["pruned"].definition
    assert stage is not None and stage.model_dump()["keep"] == 0.25
    assert "these are new: pruned, distilled" in told  # the journal of this test has identities of no plan


def test_a_recipe_that_went_away_is_told_and_a_directory_refused(
    write: Callable[..., Run], carried: list[Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write("Failed")
    assert "micro.yaml cannot be read any more" in ask(capfd, "resume")
    write("Failed", directory=str(tmp_path / "gone"))
    assert "not a directory" in ask(capfd, "resume", code=2)
    assert len(carried) == 1


def test_what_has_come_to_an_end_is_not_resumed(write: Callable[..., Run], carried: list[Any], capfd: pytest.CaptureFixture[str]) -> None:
    assert "no run in this store is incomplete" in ask(capfd, "resume")
    write("Crashed")
    write(resumes="micro-1")
    assert "no run in this store is incomplete" in ask(capfd, "resume")
    assert ask(capfd, "resume", "micro-1") == "micro-2 resumed micro-1\nnothing to do: micro-2 completed\n"
    assert "there is no run 'micro-9'" in ask(capfd, "resume", "micro-9", code=2)
    assert carried == []


def test_what_a_later_run_overtook_is_resumed_by_name_alone(
    write: Callable[..., Run], carried: list[Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write("Crashed", states=("Completed", "Running"))
    write("Failed", recipe_name="other")
    write("Failed", resumes="micro-1")
    write()  # with a mended recipe
    assert "resuming other-2 (failed)" in ask(capfd, "resume")
    write(recipe_name="other", only=("distilled",))
    assert "resuming other-2 (failed)" in ask(capfd, "resume")  # only a part of it is newer
    write(recipe_name="other")
    assert ask(capfd, "resume") == "nothing to do: micro-3 was overtaken by micro-4; name it to resume it\n"
    assert "resuming micro-3 (failed)" in ask(capfd, "resume", "micro-1")
    write("Failed")
    assert "resuming micro-7 (failed)" in ask(capfd, "resume")
    assert [resumed.run for _, _, resumed in carried] == ["other-2", "other-2", "micro-3", "micro-7"]


def test_a_living_run_is_left_alone(store: Store, write: Callable[..., Run], carried: list[Any], capfd: pytest.CaptureFixture[str]) -> None:
    ended = write("Failed")
    with journal(store, ended.model_copy(update={"state": "Running", "ended": None, "resumes": ended.run})) as alive:
        assert "micro-2 is still running" in ask(capfd, "resume", "micro-2", code=2)
        assert "micro-2 is still running" in ask(capfd, "resume", "micro-1", code=2)
        assert ask(capfd, "resume") == "nothing to do: micro-2 still running\n"
        with pytest.raises(EdgepressError, match="micro-2 .*micro-1"), journal(store, alive.run.model_copy()):
            pass
        with pytest.raises(EdgepressError, match="still running"), journal(store, ended.model_copy(update={"resumes": "micro-2"})):
            pass
        alive.end("Completed")
    assert [run.run for run in read_runs(store)] == ["micro-1", "micro-2"] and carried == []


# --- for real: killed in training, interrupted in the sweep, then finished; then parts of it again ---


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Workshop:
    made = Workshop(tmp_path_factory.mktemp("resume") / "work", checkpoint)
    (made.folder / "micro.yaml").write_text(recipe(checkpoint, SWEPT, MATRIX))
    return made


def command(shop: Workshop, *arguments: str, cwd: Path | None = None) -> Finished:
    done = subprocess.run(
        [*SAFE, *arguments], cwd=cwd or shop.folder, env=shop.environment, text=True, capture_output=True, timeout=PATIENCE, check=False
    )  # fmt: skip
    return Finished(done.returncode, done.stdout, done.stderr, json.loads((shop.folder / "outputs" / "micro" / "run.json").read_text()))


class Resuming(Workshop):
    """The same directory, where what is started is `resume`."""

    def __init__(self, shop: Workshop):
        self.folder, self.environment = shop.folder, shop.environment

    def start(self, *overrides: str, command: list[str] = SAFE) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*command, "resume"], cwd=self.folder, env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip


@pytest.fixture(scope="module")
def killed(shop: Workshop) -> Interrupted:
    """Killed while it trained; then its recipe is changed."""
    ended = shop.interrupt(shop.has_trained, signal.SIGKILL)
    assert psutil.wait_procs(ended.family, timeout=PATIENCE)[1] == []
    (shop.folder / "micro.yaml").write_text("this: is no recipe\n")
    return ended


@pytest.fixture(scope="module")
def stopped(shop: Workshop, killed: Interrupted) -> Interrupted:
    """Resumed, and stopped by Ctrl-C in the sweep."""
    return Resuming(shop).interrupt(shop.computing("quantize.rtn"), signal.SIGINT)


@pytest.fixture(scope="module")
def finished(shop: Workshop, stopped: Interrupted, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Resumed again, from elsewhere, to its end."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    return command(shop, "resume", "--store", str(shop.folder / ".edgepress"), cwd=elsewhere)


# each fixture has a test of its own, before the tests that need a later one: they take long


def test_a_killed_run_is_listed_as_crashed(shop: Workshop, killed: Interrupted, capfd: pytest.CaptureFixture[str]) -> None:
    told = json.loads(ask(capfd, "runs", "micro-1", "--json", "--store", str(shop.folder / ".edgepress")))
    assert told["state"] == "Crashed" and "Running" not in {stage["state"] for stage in told["stages"]}


def test_a_resumed_run_can_be_interrupted(shop: Workshop, stopped: Interrupted) -> None:
    assert stopped.code == 130 and "`edgepress resume`" in stopped.err and "Traceback" not in stopped.err


def test_a_run_is_resumed_to_its_end(shop: Workshop, finished: Finished) -> None:
    assert finished.code == 0, finished.out + finished.err
    assert "resuming micro-2 (interrupted)" in finished.out and "micro.yaml has changed" in finished.out
    assert set(finished.states()) == {"base", *STAGE_NAMES} and set(finished.states().values()) <= {"Completed", "Cached"}
    assert finished.states()["distilled"] == "Cached" and len(shop.contents()) == len(STAGE_NAMES)
    store = Store(shop.folder / ".edgepress")
    runs = read_runs(store)
    assert [(run.run, current_state(store, run), run.resumes) for run in runs] == [
        ("micro-1", "Crashed", None), ("micro-2", "Interrupted", "micro-1"), ("micro-3", "Completed", "micro-2"),
    ]  # fmt: skip
    assert len({(run.text, run.file, run.directory, run.outputs, run.tracking_uri, run.tracking_run) for run in runs}) == 1
    assert {stage.state for stage in runs[2].stages} <= {"Completed", "Cached"}


def test_mlflow_has_one_run_of_it_with_everything_once(shop: Workshop, finished: Finished) -> None:
    runs = shop.runs()
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert sorted(run.info.run_name or "" for run in runs) == sorted(["micro", "base", *STAGE_NAMES, "bits=2", "bits=8"])
    assert not any("edgepress.reason" in run.data.tags for run in runs)
    client = MlflowClient(f"sqlite:///{shop.folder / 'mlflow.db'}")
    for run in runs:
        for metric in run.data.metrics:
            steps = [point.step for point in client.get_metric_history(run.info.run_id, metric)]
            assert len(steps) == len(set(steps)), (run.info.run_name, metric)
    parent = next(run for run in runs if run.info.run_name == "micro")
    assert sorted(point.step for point in client.get_metric_history(parent.info.run_id, "perplexity")) == [0, 1, 2]
    for index, cell in enumerate(("bits=2", "bits=8"), 3):  # whose roads are on their own runs
        run = next(run for run in runs if run.info.run_name == cell)
        assert sorted(point.step for point in client.get_metric_history(run.info.run_id, "perplexity")) == [0, 1, 2, index]
    assert {file.path for file in client.list_artifacts(parent.info.run_id, "recipe")} == {"recipe/micro.yaml"}


def test_prefect_has_a_flow_run_for_each_with_what_it_resumes(shop: Workshop, finished: Finished) -> None:
    with sqlite3.connect(shop.folder / ".edgepress" / "prefect" / "prefect.db") as connection:
        flows = [json.loads(tags) for (tags,) in connection.execute("select tags from flow_run order by created")]
    assert [[tag for tag in tags if tag.startswith("resumes:")] for tags in flows] == [[], ["resumes:micro-1"], ["resumes:micro-2"]]


@pytest.fixture(scope="module")
def parts(shop: Workshop, finished: Finished, checkpoint: Path) -> Iterator[Finished]:
    """One copy of the sweep and what it needs; it and the first stage are computed again."""
    (shop.folder / "micro.yaml").write_text(recipe(checkpoint, SWEPT, MATRIX))
    yield command(shop, "run", "micro.yaml", "--only", FIRST, "--from", FIRST, "--force", "pruned")


def test_parts_are_run_and_run_again(shop: Workshop, finished: Finished, parts: Finished) -> None:
    assert parts.code == 0, parts.out + parts.err
    assert parts.states() == {"base": "Cached", "pruned": "Completed", "distilled": "Cached", FIRST: "Completed"}
    assert [name for name, row in parts.rows.items() if row["computed"]] == ["pruned", FIRST]
    for name, row in parts.rows.items():
        assert (row["content"], row["path"]) == (finished.rows[name]["content"], finished.rows[name]["path"])
    assert "BYTES" not in parts.out and [cell["name"] for cell in parts.summary["sweep"]["cells"]] == ["bits=2"]
    assert not list((shop.folder / ".edgepress" / "damaged").iterdir()) and not list((shop.folder / ".edgepress" / "work").iterdir())
    run = read_run(Store(shop.folder / ".edgepress"), "micro-4")
    assert [stage.name for stage in run.stages] == ["pruned", "distilled", FIRST]
    assert (run.only, run.again) == ((FIRST,), ("pruned", FIRST))
    assert (shop.folder / "outputs" / "micro" / SECOND).is_symlink()  # of the run before


def test_of_a_forced_stage_the_store_has_the_newer_manifest(shop: Workshop, parts: Finished) -> None:
    store = Store(shop.folder / ".edgepress")
    since = read_run(store, "micro-4").started
    committed = {name: store.manifest(row["identity"])["committed"] > since for name, row in parts.rows.items() if name != "base"}
    assert committed == {"pruned": True, "distilled": False, FIRST: True}
