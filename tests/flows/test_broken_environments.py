"""Every command in every kind of broken environment: one message and exit code 2, no traceback, nothing that nobody expected."""

import io
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.cli.failures import report_failure
from tasks.store.journal import journal, read_runs
from tasks.store.store import Store
from tasks.store.summaries import write_summary
from tests.flows.recipes import edgepress, recipe
from tests.flows.summaries import row, summary
from tests.tasks.entries import a_run, commit

STAGES = "  rtn: {uses: quantize.rtn, group_size: 32}\n"
AWAY = "http://ada:hunter2@127.0.0.1:9"
RUN = [["run", "micro.yaml"]]
PLANS = [["validate", "micro.yaml"], ["plan", "micro.yaml"], ["serve", "micro.yaml"], ["deploy", "micro.yaml", "--pool", "edge"], *RUN]
RECIPES = [*PLANS, ["sensitivity", "micro.yaml"], ["study", "micro.yaml"]]
RUNS = [["runs", "demo-1"], ["resume", "demo-1"], ["report", "demo-1"], ["compare", "demo-1", "demo-2"]]
STORE = [
    ["store", *line.split()] for line in ("ls", "verify", "gc --keep-last 1", "pin demo-1", "unpin demo-1", "export x.tar", "import x.tar")
]
MODELS = [["generate", "model", "-p", "x"], ["bench", "model"], ["inspect", "model"]]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe, its model, and a store with an entry and two runs, of which the first failed."""
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "EDGEPRESS_STORE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    shutil.copytree(checkpoint, "model")
    Path("micro.yaml").write_text(recipe("model", STAGES))
    Path("file").touch()
    store = Store(tmp_path / ".edgepress")
    entry = commit(store)
    for state in ("Failed", "Completed"):
        with journal(store, a_run("demo", [entry.identity], outputs=str(tmp_path / "outputs"))) as opened:
            write_summary(store, opened.run.run, summary([row("base", [])], journal=opened.run.run))
            opened.end(state)  # type: ignore[arg-type]
    return tmp_path


def write(path: str, content: bytes) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content)


def directory(path: str) -> None:
    Path(path).unlink(missing_ok=True)
    Path(path).mkdir(parents=True)


def below_a_file(commands: list[list[str]]) -> list[list[str]]:
    return [[*command, "--store", "file/store"] for command in commands]


CASES: dict[str, tuple[Callable[[pytest.MonkeyPatch], object], list[list[str]], str]] = {
    "recipe-no-utf8": (lambda _: write("micro.yaml", b"name: \xff\n"), RECIPES, "micro.yaml"),
    "recipe-binary": (lambda _: write("micro.yaml", bytes(range(32))), RECIPES, "micro.yaml"),
    "recipe-directory": (lambda _: directory("micro.yaml"), RECIPES, "micro.yaml"),
    "recipe-missing": (lambda _: Path("micro.yaml").unlink(), RECIPES, "micro.yaml"),
    "recipe-contains-itself": (lambda _: write("micro.yaml", b"a: &a [*a]\n"), RECIPES, "micro.yaml:1: a"),
    "recipe-bad-date": (lambda _: write("micro.yaml", b"a: 2026-13-45\n"), RECIPES, "micro.yaml:1"),
    "recipe-nested": (lambda _: write("micro.yaml", b"a: " + b"[" * 5000), RECIPES, "micro.yaml"),
    "recipe-long-name": (lambda _: None, [[command, "x" * 400, *more] for command, _, *more in RECIPES], "x" * 80),
    "model-file": (lambda _: (shutil.rmtree("model"), Path("model").touch()), [*PLANS, *MODELS], "model"),
    "model-config-no-utf8": (lambda _: write("model/config.json", b"\xff"), [*PLANS, MODELS[0], MODELS[2]], "config.json"),
    "model-config-directory": (lambda _: directory("model/config.json"), [*PLANS, *MODELS], "config.json"),
    "store-below-file": (lambda _: None, below_a_file([*RECIPES[:-1], *RUNS, *STORE, ["sync"]]), "file/store"),
    "store-file": (lambda patch: patch.setenv("EDGEPRESS_STORE", "file"), [*RECIPES[:-1], *RUNS, *STORE, ["sync"]], "file"),
    "store-damaged": (lambda _: write(".edgepress/schema.json", b"{"), [*PLANS, *RUNS, *STORE, ["sync"]], "schema.json"),
    "journal-damaged": (lambda _: write(".edgepress/runs/demo-1.json", b"\xff{"), [*RUNS, ["runs"], ["store", "gc", "--keep-last", "1"]], "demo-1.json"),
    "journal-directory": (lambda _: directory(".edgepress/runs/demo-1.json"), [*RUNS, ["runs"], ["store", "gc", "--keep-last", "1"]], "demo-1.json"),
    "summary-damaged": (lambda _: write(".edgepress/runs/demo-1.summary.json", b"[]"), [RUNS[2], RUNS[3]], "demo-1.summary.json"),
    "outbox-damaged": (lambda _: write(".edgepress/outbox/1-a.jsonl", b"\xff\n"), [["sync"]], "1-a.jsonl"),
    "outputs-below-file": (lambda _: None, [["run", "micro.yaml", "--outputs", "file/outputs"]], "file/outputs"),
    "outputs-directory-in-the-way": (lambda _: write("outputs/micro/rtn/mine.txt", b"x"), RUN, "outputs/micro/rtn"),
    "page-below-file": (lambda _: None, [["report", "demo-1", "--out", "file/x.html"], ["compare", "demo-1", "demo-2", "--html", "file/x.html"]], "file/x.html"),
    "export-below-file": (lambda _: None, [["store", "export", "file/x.tar"], ["store", "import", "file/x.tar"]], "file/x.tar"),
    "mlflow-away": (lambda patch: patch.setenv("MLFLOW_TRACKING_URI", AWAY), [["ui"], *RUN], "http://***@127.0.0.1:9"),
    "mlflow-below-file": (lambda patch: patch.setenv("MLFLOW_TRACKING_URI", "sqlite:///file/x.db"), [["ui"]], "file/x.db"),
    "mlflow-no-database": (lambda patch: (write("x.db", b"text" * 100), patch.setenv("MLFLOW_TRACKING_URI", "sqlite:///x.db")), [["ui"]], "x.db"),
    "mlflow-no-address": (lambda patch: patch.setenv("MLFLOW_TRACKING_URI", "nonsense://x"), [["ui"]], "nonsense://x"),
    "prefect-away": (lambda patch: patch.setenv("PREFECT_API_URL", f"{AWAY}/api"), [PLANS[2], PLANS[3], *RUN], "http://***@127.0.0.1:9"),
    "prefect-no-address": (lambda patch: patch.setenv("PREFECT_API_URL", "nonsense"), [PLANS[2], PLANS[3], *RUN], "nonsense"),
    "dask-away": (lambda _: write("micro.yaml", recipe("model", STAGES, "execution: {runner: dask, address: 'tcp://127.0.0.1:9'}\n").encode()), RUN, "tcp://127.0.0.1:9"),
}  # fmt: skip


def commands() -> Iterator[object]:
    for kind, (_, every, _) in CASES.items():
        for command in every:
            yield pytest.param(kind, command, id=f"{kind}-{'-'.join(word[:12] for word in command)}")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "command"), commands())
def test_the_broken_service_is_named(
    kind: str, command: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    broken, _, named = CASES[kind]
    broken(monkeypatch)
    with temporary_settings({PREFECT_API_URL: os.environ.get("PREFECT_API_URL")}):  # Prefect reads the environment when it is imported
        code, out, err = edgepress(command, capfd)
    assert "Traceback" not in out + err and "unexpected" not in err and "hunter2" not in out + err
    assert (code, named in err) == (2, True), out + err
    if command[0] == "run":
        assert len(list(Path(".edgepress/runs").glob("*.json"))) == 4  # nothing was run


@pytest.mark.parametrize("prompt", [os.fsdecode(b"caf\xe9"), "-"])
def test_a_prompt_must_be_utf8(prompt: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    code, _, err = edgepress(["generate", "model", "-p", prompt], capfd)
    assert code == 2 and "UTF-8" in err and "Traceback" not in err


def test_a_directory_that_cannot_be_written(folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    place = folder / "fixed"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", place], capture_output=True, check=False).returncode:
        pytest.skip("no file system that cannot be written can be mounted here")
    try:
        Path("micro.yaml").write_text(recipe(folder / "model", STAGES))
        monkeypatch.chdir(place)
        for command in ("run", "validate", "plan"):
            code, _, err = edgepress([command, str(folder / "micro.yaml")], capfd)
            assert code == 2 and str(place / ".edgepress") in err and "--store" in err and "Traceback" not in err
    finally:
        monkeypatch.chdir(folder)
        subprocess.run(["umount", place], check=True)


def test_unexpected_errors_write_a_traceback_file(folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(folder))

    def fail(*_: object) -> None:
        raise KeyError("postgresql://ada:hunter2@db/x")

    monkeypatch.setattr("flows.cli.main.make_plan", fail)
    code, _, err = edgepress(["validate", "micro.yaml"], capfd)
    (log,) = folder.glob("edgepress-error-*.log")
    assert code == 1 and "KeyError" in err and str(log) in err and "--debug" in err and "Traceback" not in err
    assert "in fail" in log.read_text() and "hunter2" not in err + log.read_text()
    code, _, err = edgepress(["--debug", "validate", "micro.yaml"], capfd)
    assert code == 1 and "in fail" in err and "hunter2" not in err


def test_an_error_without_message_shows_its_type(capfd: pytest.CaptureFixture[str]) -> None:
    assert report_failure(AssertionError(), debug=False) == 1
    assert "AssertionError" in capfd.readouterr().err


def test_the_journal_lists_every_run(folder: Path) -> None:
    assert [run.state for run in read_runs(Store(folder / ".edgepress"))] == ["Failed", "Completed"]
