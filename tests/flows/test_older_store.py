"""What an older edgepress left on disk is still of use: its store, its links, its runs in MLflow, its registered model (older/README.md)."""

import json
import os
import sqlite3
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import closing
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mlflow
import pandas
import pytest
from mlflow import MlflowClient, pyfunc

from tests.flows.recipes import edgepress
from tests.flows.workshop import SAFE
from tests.waiting import PATIENCE

ARCHIVE = Path(__file__).with_name("older") / "store_73afda4.tar.xz"
WRITTEN_IN = "/tmp/edgepress-older"
STAGES = ["pruned", "distilled", "tuned", "gptq", "gguf"]
OF_A_MACHINE = {"speed", "energy", "comparison"}  # records that another machine makes anew; comparisons name those they are made of


@pytest.fixture
def older(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory as its user would find it, which is the current one, and MLflow's."""
    folder = tmp_path / "work"
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="tar")
    move(folder, WRITTEN_IN, str(folder))
    monkeypatch.chdir(folder)
    monkeypatch.delenv("EDGEPRESS_STORE", raising=False)
    before, uri = mlflow.get_tracking_uri(), f"sqlite:///{folder / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # as MLflow does in the next line, but taken back afterwards
    mlflow.set_tracking_uri(uri)
    yield folder
    mlflow.set_tracking_uri(before)


def move(folder: Path, old: str, new: str) -> None:
    """Put another path in place of the one that links, files and MLflow's database name."""
    for path in list(folder.rglob("*")):
        if path.is_symlink():
            target = str(path.readlink()).replace(old, new)
            path.unlink()
            path.symlink_to(target)
        elif path.is_file() and path.suffix != ".db" and old.encode() in (found := path.read_bytes()):
            path.write_bytes(found.replace(old.encode(), new.encode()))
    with closing(sqlite3.connect(folder / "mlflow.db")) as connection, connection:
        for (table,) in connection.execute("select name from sqlite_master where type = 'table'").fetchall():
            for _, column, *_ in connection.execute(f'pragma table_info("{table}")').fetchall():
                connection.execute(
                    f'update "{table}" set "{column}" = replace("{column}", ?, ?) where instr("{column}", ?)', (old, new, old)
                )


def raised(folder: Path) -> list[str]:
    """Libraries that decide identities and are of another version here: by design nothing is cached then."""
    documents = [json.loads(file.read_text())["identity"] for file in folder.glob(".edgepress/objects/*/manifest.json")]
    known = {library: number for document in documents for library, number in document["libraries"].items()}
    assert {"torch", "transformers", "gguf"} <= known.keys()
    return [f"{library} {number}, here {installed(library)}" for library, number in sorted(known.items()) if number != installed(library)]


def installed(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "absent"


def skip_if_raised(folder: Path) -> None:
    if other := raised(folder):
        pytest.skip(f"the older store was written with {'; '.join(other)}: its identities are others")


def ask(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    code, out, err = edgepress(arguments, capfd)
    assert code == 0, out + err
    return out


def command(folder: Path, *arguments: str) -> str:
    """The command in a process of its own, which must succeed; return its output."""
    hidden = ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "EDGEPRESS_STORE", "PYTHONSAFEPATH")
    environment = {
        **{key: value for key, value in os.environ.items() if key not in hidden},
        "HF_HUB_OFFLINE": "1", "PREFECT_HOME": str(folder.parent / "prefect"), "TMPDIR": str(folder.parent),
    }  # fmt: skip
    done = subprocess.run([*SAFE, *arguments], cwd=folder, env=environment, text=True, capture_output=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def runs(capfd: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    return {run["run"]: run for run in json.loads(ask(capfd, "runs", "--json"))["runs"]}


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    """Those of the summary beside the results, by stage."""
    return {row["stage"]: row for row in json.loads((folder / "outputs" / "older" / "run.json").read_text())["rows"]}


def records(folder: Path) -> dict[str, str]:
    """What the store's measurements are, by file."""
    return {file.name: json.loads(file.read_text())["key"]["record"] for file in (folder / ".edgepress" / "records").glob("*.json")}


def versions() -> set[int]:
    """Of the registered model."""
    return {int(made.version) for made in MlflowClient().search_model_versions("name = 'tiny'")}


# --- reading it ---


def test_its_runs_are_listed(older: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = runs(capfd)
    assert {name: run["state"] for name, run in found.items()} == {
        "older-1": "Completed", "older-2": "Completed", "strict-3": "Failed", "swept-4": "Completed", "older-5": "Interrupted",
    }  # fmt: skip
    assert {stage["name"]: stage["state"] for stage in found["older-1"]["stages"]} == dict.fromkeys(STAGES, "Completed")
    assert {stage["name"]: stage["state"] for stage in found["older-2"]["stages"]} == dict.fromkeys(STAGES, "Cached")
    assert found["older-5"]["overrides"] == ["stages.tuned.steps=400"]
    table = ask(capfd, "runs")
    assert all(name in table for name in found) and "Interrupted" in table


@pytest.mark.parametrize("run", ["older-1", "older-2", "strict-3", "swept-4", "older-5"])
def test_a_run_is_shown_and_reported(older: Path, run: str, capfd: pytest.CaptureFixture[str]) -> None:
    stages = ask(capfd, "runs", run)
    assert f"{run}: " in stages and all(name in stages for name in STAGES)
    printed = ask(capfd, "report", run, "--text")
    assert f"{rows(older)['distilled']['metrics']['perplexity']:.3f}" in printed and ("FAIL gguf" in printed) == (run == "strict-3")
    ask(capfd, "report", run, "--out", "page.html")
    assert run in (older / "page.html").read_text()


def test_its_runs_are_compared(older: Path, capfd: pytest.CaptureFixture[str]) -> None:
    printed = ask(capfd, "compare", "older-1", "strict-3")
    assert "older-1" in printed and "strict-3" in printed and "gguf" in printed


def test_its_store_verifies(older: Path, capfd: pytest.CaptureFixture[str]) -> None:
    printed = ask(capfd, "store", "verify")
    assert printed.startswith("6 entries") and f", {len(records(older))} records, 5 runs: all intact" in printed
    listed = json.loads(ask(capfd, "store", "ls", "--json"))
    assert listed["pinned"] == ["older-1"]
    names = {name for row in listed["entries"] for name in row["names"]}
    assert {f"outputs/older/{stage}" for stage in STAGES} <= names and "outputs/swept/gguf@type=f16" in names
    assert all(row["identity"][:12] in ask(capfd, "store", "ls") for row in listed["entries"])


@pytest.mark.parametrize("stage", STAGES)
def test_its_results_are_intact(older: Path, stage: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert "intact" in ask(capfd, "inspect", f"outputs/older/{stage}")


# --- running it again ---


@pytest.fixture
def renamed(older: Path) -> Path:
    """Its recipe with today's names of keys."""
    recipe = older / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("mixture:", "jsd_beta:").replace("misfit:", "on_indivisible:"))
    return older


@pytest.mark.parametrize("arguments", [("plan", "recipe.yaml"), ("run", "recipe.yaml"), ("resume",)])
def test_former_keys_are_refused_by_name(older: Path, arguments: tuple[str, ...], capfd: pytest.CaptureFixture[str]) -> None:
    before = runs(capfd).keys()
    code, _, err = edgepress(arguments, capfd)
    assert code == 2 and "recipe.yaml:14: stages.distilled.mixture" in err and "jsd_beta" in err
    assert runs(capfd).keys() == before


def test_everything_is_in_the_store(renamed: Path, capfd: pytest.CaptureFixture[str]) -> None:
    skip_if_raised(renamed)
    assert ask(capfd, "plan", "recipe.yaml").count("in the store") == len(STAGES)


def test_its_normalised_base_is_opened(renamed: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It is found by the model's directory, which moved: so it takes the place of a fresh one."""
    skip_if_raised(renamed)
    (old,) = (renamed / ".edgepress" / "bases").iterdir()
    old = old.rename(renamed / "old")
    ask(capfd, "plan", "recipe.yaml")
    (fresh,) = (renamed / ".edgepress" / "bases").iterdir()
    report = json.loads((old / "report.json").read_text())
    assert report["changed"] and json.loads((fresh / "report.json").read_text()) == report
    config = json.loads((fresh / "model" / "config.json").read_text())
    fresh.rename(renamed / "fresh")
    old.rename(fresh)
    assert config == json.loads((fresh / "model" / "config.json").read_text())
    assert ask(capfd, "plan", "recipe.yaml").count("in the store") == len(STAGES)


@pytest.mark.slow
def test_a_run_computes_nothing(renamed: Path, capfd: pytest.CaptureFixture[str]) -> None:
    skip_if_raised(renamed)
    client, measured, before = MlflowClient(), records(renamed), rows(renamed)
    (experiment,) = [found for found in client.search_experiments() if found.name == "edgepress"]
    known = {run.info.run_id for run in client.search_runs([experiment.experiment_id])}
    command(renamed, "run", "recipe.yaml")
    found = rows(renamed)
    assert {name: (found[name]["state"], found[name]["computed"]) for name in STAGES} == dict.fromkeys(STAGES, ("Cached", False))
    for name, row in before.items():
        for metric in ("accuracy", "perplexity", "kl_to_base", "size_mb"):
            assert found[name]["metrics"].get(metric) == row["metrics"].get(metric)
        assert (found[name]["content"], found[name]["identity"]) == (row["content"], row["identity"])
    assert {kind for file, kind in records(renamed).items() if file not in measured} <= OF_A_MACHINE
    assert runs(capfd)["older-6"]["state"] == "Completed"
    new = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id]) if run.info.run_id not in known}
    assert new.keys() == {"older", "base", *STAGES} and {run.info.status for run in new.values()} == {"FINISHED"}
    assert new["gguf"].data.tags["edgepress.computed_by"] in known
    assert versions() == {1}


@pytest.mark.slow
def test_its_interrupted_work_is_continued(renamed: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (workplace,) = (renamed / ".edgepress" / "work").iterdir()
    other = raised(renamed)
    command(renamed, "run", "recipe.yaml", "--set", "stages.tuned.steps=400")
    resumed = runs(capfd)["older-6"]
    assert resumed["state"] == "Completed"
    states = {stage["name"]: stage["state"] for stage in resumed["stages"]}
    assert versions() == {1, 2}
    if not other:
        assert states == {"pruned": "Cached", "distilled": "Cached", "tuned": "Completed", "gptq": "Completed", "gguf": "Completed"}
        assert not workplace.exists()
        manifest = json.loads((renamed / ".edgepress" / "objects" / workplace.name / "manifest.json").read_text())
        assert min(step for step, _ in manifest["curves"]) > 200  # where its last checkpoint was
    assert set(states.values()) <= {"Completed", "Cached"}


def test_its_registered_model_answers(older: Path, capfd: pytest.CaptureFixture[str]) -> None:
    prompts = pandas.DataFrame({"prompt": ["Ida put the bell", "Where is the lamp?"]})
    for model in ("models:/tiny@champion", "models:/tiny@candidate", "models:/tiny/1"):
        answers = pyfunc.load_model(model).predict(prompts, params={"max_new_tokens": 8})
        assert list(answers.columns) == ["text"]
        for prompt, text in zip(prompts["prompt"], answers["text"], strict=True):
            assert ask(capfd, "generate", "outputs/older/gguf", "-p", prompt, "-n", "8", "--temp", "0") == f"{prompt}{text}\n"
