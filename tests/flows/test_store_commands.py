"""`edgepress store`, as it is typed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.store.journal import journal
from tasks.store.store import Store, publish
from tests.flows.recipes import edgepress
from tests.tasks.entries import a_run, commit, put_record


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Two runs of a recipe `demo` that share their first entry, in the current directory's store."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EDGEPRESS_STORE", raising=False)
    made = Store(tmp_path / ".edgepress")
    parent = commit(made, "parent", "p")
    for name in ("old", "new"):
        entry = commit(made, name, name, [parent.identity])
        put_record(made, entry.content)
        with journal(made, a_run("demo", [parent.identity, entry.identity])) as opened:
            opened.end("Completed")
        publish(entry.path, tmp_path / "outputs", "demo", name)
    return made


def run(capfd: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """Standard output, or standard error where the command is to be refused."""
    ended, out, err = edgepress(["store", *arguments], capfd)
    assert ended == code, err
    assert "Traceback" not in err
    return err if code == 2 else out


def test_list(store: Store, capfd: pytest.CaptureFixture[str]) -> None:
    rows = {row["identity"]: row for row in json.loads(run(capfd, "ls", "--json"))["entries"]}
    assert sorted(rows) == store.entries()
    assert sorted(row["names"] for row in rows.values()) == [[], ["outputs/demo/new"], ["outputs/demo/old"]]
    table = run(capfd, "ls")
    assert all(fragment in table for fragment in ("prune.width", "outputs/demo/new", "3 entries", *(identity[:12] for identity in rows)))


def test_verify(store: Store, capfd: pytest.CaptureFixture[str]) -> None:
    assert "3 entries" in (printed := run(capfd, "verify")) and "2 records, 2 runs: all intact" in printed
    damaged = store.entries()[0]
    (store.root / "objects" / damaged / "content" / "model.safetensors").write_text("x")
    printed = run(capfd, "verify", code=1)
    assert f"damaged: entry {damaged}: " in printed and "model.safetensors" in printed and "1 damaged, set aside in" in printed
    assert "2 entries" in run(capfd, "verify")


def test_collecting_garbage(store: Store, capfd: pytest.CaptureFixture[str]) -> None:
    before = store.entries()
    printed = run(capfd, "gc", "--keep-last", "1", "--dry-run")
    assert "would remove: 1 link, 1 entry, 1 record, 1 run" in printed and store.entries() == before
    assert "removed: 1 link, 1 entry, 1 record, 1 run" in run(capfd, "gc", "--keep-last", "1")
    assert len(store.entries()) == 2 and [link.name for link in Path("outputs/demo").iterdir()] == ["new"]
    assert "removed: nothing" in run(capfd, "gc", "--keep-last", "1")
    assert "keep-last" in run(capfd, "gc", "--keep-last", "0", code=2)
    assert "keep-last" in run(capfd, "gc", code=2)


def test_pins(store: Store, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(capfd, "pin", "demo-1") == "pinned: demo-1\n"
    assert "removed: nothing" in run(capfd, "gc", "--keep-last", "1")
    assert json.loads(run(capfd, "ls", "--json"))["pinned"] == ["demo-1"]
    assert run(capfd, "unpin", "demo-1") == "no longer pinned: demo-1\n"
    assert "there is no run and no identity 'demo-7'" in run(capfd, "pin", "demo-7", code=2)
    assert "'demo-1' is not pinned" in run(capfd, "unpin", "demo-1", code=2)


@pytest.mark.parametrize("place", ["exported.tar", "exported"])
def test_export_and_import(store: Store, capfd: pytest.CaptureFixture[str], place: str) -> None:
    assert f"exported 2 entries and 1 records, 0.00 MB, to {place}" in run(capfd, "export", place, "demo")
    printed = run(capfd, "import", place, "--store", "other")
    assert "imported 2 entries and 1 records" in printed and "no run names them yet" in printed
    new = Path("outputs/demo/new").resolve().parent.name
    assert new in Store(Path("other")).entries()
    assert "imported 0 entries and 0 records" in (again := run(capfd, "import", place, "--store", "other")) and "2 were there" in again
    run(capfd, "export", f"alone-{place}", new[:10])
    run(capfd, "export", f"both-{place}", new[:10], "--ancestors")
    run(capfd, "export", f"all-{place}")
    for form, count in [("alone", 1), ("both", 2), ("all", 3)]:
        assert f"imported {count} entries" in run(capfd, "import", f"{form}-{place}", "--store", f"store-{form}")


@pytest.mark.parametrize(
    "command", [["ls"], ["verify"], ["gc", "--keep-last", "1"], ["pin", "demo-1"], ["unpin", "x"], ["export", "x.tar"]]
)
def test_an_absent_store_is_refused(command: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert "there is no store in absent" in run(capfd, *command, "--store", "absent", code=2)
    assert not Path("absent").exists()


def test_it_starts_without_torch_and_without_file_systems() -> None:
    code = "import json, sys, flows.cli.main, tasks.store.garbage, tasks.store.journal; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "prefect", "mlflow", "fsspec"} & set(json.loads(done.stdout))
