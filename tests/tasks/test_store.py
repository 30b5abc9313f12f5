import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from compression.errors import EdgepressError
from compression.files import write_json
from tasks.errors import Cancelled
from tasks.store.store import Entry, Store, check_links, publish, unpublish
from tests.tasks.entries import KNOWN, commit, document_of, identity_of
from tests.waiting import PATIENCE

A = identity_of("a")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_committed_entry_is_found(store: Store) -> None:
    made = commit(store)
    found = store.get(A)
    assert found is not None and found == made
    assert (found.path / "model.safetensors").read_text() == "weights"
    assert found.manifest["identity"] == document_of("a")
    assert {key: found.manifest[key] for key in KNOWN} == KNOWN
    assert set(found.manifest["files"]) == {"model.safetensors", "sub/config.json"}
    assert not (store.root / "work" / A).exists()
    assert store.has(A) and store.entries() == [A]


def test_equal_bytes_have_equal_content(store: Store) -> None:
    assert commit(store, "a").content == commit(store, "b").content != commit(store, "c", "other").content


def test_manifest_matches_sha256sum(store: Store) -> None:
    entry = commit(store)
    told = subprocess.run(["sha256sum", entry.path / "model.safetensors"], capture_output=True, text=True, check=True).stdout.split()[0]
    assert entry.manifest["files"]["model.safetensors"] == told


@pytest.mark.parametrize("moment", ["fsync_tree", "write_json"])
def test_interrupted_commit_leaves_no_entry(store: Store, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    def power_cut(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(f"tasks.store.store.{moment}", power_cut)
        commit(store)
    assert store.get(A) is None and not store.has(A) and store.entries() == []
    commit(store)
    assert store.get(A) is not None


def test_workplace_keeps_only_work_of_killed_run(store: Store) -> None:
    home = store.workplace("a")
    (home / "out" / "half").write_text("")
    (home / "work" / "checkpoint-2").mkdir()
    (home / "commit-1234").mkdir()
    again = store.workplace("a")
    assert again == home
    assert list((home / "out").iterdir()) == []
    assert sorted(p.name for p in home.iterdir()) == ["out", "work"]
    assert (home / "work" / "checkpoint-2").is_dir()


def test_recommitted_content_gets_new_manifest(store: Store) -> None:
    first = commit(store)
    inode = (first.path / "model.safetensors").stat().st_ino
    second = commit(store)
    assert store.get(A) == second and second.content == first.content and second.manifest["committed"] > first.manifest["committed"]
    assert (second.path / "model.safetensors").stat().st_ino == inode
    assert not list((store.root / "damaged").iterdir()) and not list((store.root / "work").iterdir())


def test_changed_content_replaces_old_entry(store: Store) -> None:
    commit(store)
    second = commit(store, text="weightz")
    assert store.get(A) == second and (second.path / "model.safetensors").read_text() == "weightz"
    (old,) = (store.root / "damaged").iterdir()
    assert (old / "content" / "model.safetensors").read_text() == "weights"


def test_commit_killed_before_rename_is_finished(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    commit(store)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Store, "_install", kill)
        commit(store, text="weightz")
    assert not store.has(A)
    found = store.get(A)
    assert found is not None and (found.path / "model.safetensors").read_text() == "weightz"
    (old,) = (store.root / "damaged").iterdir()
    assert (old / "content" / "model.safetensors").read_text() == "weights"
    assert not list((store.root / "work").iterdir())


def test_leftovers_of_finished_commit_are_removed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    (store.workplace(A) / "out" / "weights").touch()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("tasks.store.store.shutil.rmtree", kill)
        store.commit(A, document_of("a"), **KNOWN)
    assert store.has(A) and (store.root / "work" / A / "work").is_dir()
    assert store.get(A) is not None and not list((store.root / "work").iterdir())
    (store.workplace(A) / "work" / "checkpoint-2").mkdir()  # it is made again, and that was killed: this one is gone on with
    assert store.get(A) is not None and (store.root / "work" / A / "work" / "checkpoint-2").is_dir()


def flip(entry: Entry) -> None:
    (entry.path / "model.safetensors").write_text("weightz")


def cut(entry: Entry) -> None:
    (entry.path / "sub" / "config.json").unlink()


def add(entry: Entry) -> None:
    (entry.path / "new").touch()


def halve_manifest(entry: Entry) -> None:
    manifest = entry.path.parent / "manifest.json"
    manifest.write_text(manifest.read_text()[:40])


def exchange_manifest(entry: Entry) -> None:
    """A whole one, of other content."""
    manifest = json.loads((entry.path.parent / "manifest.json").read_text())
    (entry.path.parent / "manifest.json").write_text(json.dumps({**manifest, "identity": document_of("b")}))


def lose_manifest(entry: Entry) -> None:
    (entry.path.parent / "manifest.json").unlink()


@pytest.mark.parametrize("damage", [flip, cut, add, halve_manifest, exchange_manifest, lose_manifest])
def test_damaged_entry_is_quarantined(store: Store, damage: Any) -> None:
    damage(commit(store))
    assert store.get(A) is None
    assert [p.name.split(".")[0] for p in (store.root / "damaged").iterdir()] == [A]
    assert store.entries() == []
    assert commit(store) == store.get(A)


def test_lock_dies_with_its_owner(store: Store) -> None:
    code = "import sys\nfrom pathlib import Path\nfrom tasks.store.store import Store\nwith Store(Path(sys.argv[1])).lock('x'):\n    print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen([sys.executable, "-P", "-c", code, store.root], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    entered = threading.Event()

    def enter() -> None:
        with store.lock("x"):
            entered.set()

    thread = threading.Thread(target=enter)
    thread.start()
    with store.lock("another"):  # identities do not wait for each other
        assert not entered.wait(0.5)
    holder.kill()
    holder.wait()
    thread.join(PATIENCE)
    assert entered.is_set()


def test_waiting_for_lock_can_be_cancelled(store: Store) -> None:
    code = "import sys\nfrom pathlib import Path\nfrom tasks.store.store import Store\nwith Store(Path(sys.argv[1])).lock('x'):\n    print('held', flush=True); sys.stdin.read()"
    is_cancelled, entered = threading.Event(), threading.Event()
    caught: list[BaseException] = []

    def enter() -> None:
        try:
            with store.lock("x", is_cancelled.is_set):
                entered.set()
        except Cancelled as error:
            caught.append(error)

    with subprocess.Popen(
        [sys.executable, "-P", "-c", code, store.root], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        thread = threading.Thread(target=enter, daemon=True)
        thread.start()
        thread.join(0.5)
        assert thread.is_alive() and not entered.is_set()
        is_cancelled.set()
        thread.join(PATIENCE)
        assert not thread.is_alive() and len(caught) == 1 and not entered.is_set()
    with store.lock("x", is_cancelled.is_set):  # free, so there is nothing to give up
        pass


def test_unreadable_record_counts_as_absent(store: Store) -> None:
    assert store.record("k") is None
    store.put_record("k", {"metrics": {"perplexity": 3.5}})
    assert store.record("k") == {"metrics": {"perplexity": 3.5}}
    whole = (store.root / "records" / "k.json").read_text()
    for damaged in ('{"metr', whole.replace("3.5", "3.4"), "[]"):
        (store.root / "records" / "k.json").write_text(damaged)
        assert store.record("k") is None
    store.put_record("k", {"metrics": {}})
    assert store.record("k") == {"metrics": {}}
    assert len(list((store.root / "damaged").iterdir())) == 3


def test_record_without_checksum_is_accepted(store: Store) -> None:
    write_json(store.root / "records" / "k.json", {"metrics": {"perplexity": 3.5}})
    assert store.record("k") == {"metrics": {"perplexity": 3.5}}


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("moment", ["tasks.store.store.fsync_tree", "compression.files.os.fsync", "compression.files.Path.replace"])
def test_full_disk_leaves_store_intact(store: Store, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    commit(store, "before")
    store.put_record("k", {"metrics": {"perplexity": 3.5}})
    with monkeypatch.context() as patch:
        patch.setattr(moment, full)
        with pytest.raises(OSError, match="No space left"):
            commit(store)
        if moment != "tasks.store.store.fsync_tree":
            with pytest.raises(OSError, match="No space left"):
                store.put_record("k", {"metrics": {"perplexity": 4}})
    assert store.entries() == [identity_of("before")] and store.get(A) is None
    assert store.record("k") == {"metrics": {"perplexity": 3.5}} and store.records() == ["k"]
    assert [p.name for p in (store.root / "records").iterdir()] == ["k.json"]
    assert commit(store) == store.get(A)


def test_really_full_disk_leaves_store_intact(small_disk: Path) -> None:
    store = Store(small_disk / "store")
    commit(store, "before", "x" * 300_000)
    with pytest.raises(OSError, match="No space left"):
        commit(store, "a", "x" * 900_000)
    with pytest.raises(OSError, match="No space left"):
        store.put_record("k", {"text": "x" * 900_000})
    assert store.entries() == [identity_of("before")] and store.records() == []
    assert store.get(identity_of("before")) is not None
    assert commit(store, "a", "x" * 300_000) == store.get(A)


def test_second_process_waits_for_first(store: Store, tmp_path: Path) -> None:
    """As `compute_stage` does it: lock, look, compute, commit."""
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom tasks.store.store import Store\nfrom tests.tasks.entries import commit, identity_of\n"
        "store = Store(Path(sys.argv[1]))\n"
        "with store.lock(identity_of('a')):\n"
        "    found = store.get(identity_of('a'))\n"
        "    if found is None:\n"
        "        time.sleep(1)\n"
        "        commit(store)\n"
        "print('found' if found else 'computed')"
    )
    ours = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    both = [subprocess.Popen([sys.executable, "-c", code, store.root], stdout=subprocess.PIPE, text=True, env=ours) for _ in range(2)]
    assert sorted(process.communicate(timeout=PATIENCE)[0].strip() for process in both) == ["computed", "found"]
    assert store.get(A) is not None and list((store.root / "damaged").iterdir()) == []


def test_try_lock_does_not_wait(store: Store) -> None:
    with store.lock("x"), store.try_lock("x") as held:
        assert not held
    with store.try_lock("x") as held, store.try_lock("x") as twice:
        assert held and not twice


def test_intact_foreign_entry_is_adopted(store: Store, tmp_path: Path) -> None:
    other = Store(tmp_path / "other")
    made = commit(other)
    again = store.root / "work" / "again"
    shutil.copytree(made.path.parent, again)
    with pytest.raises(EdgepressError, match="another identity"):
        store.adopt(identity_of("b"), again)
    (again / "content" / "model.safetensors").write_text("weightz")
    with pytest.raises(EdgepressError, match=r"model\.safetensors"):
        store.adopt(A, again)
    (again / "content" / "model.safetensors").write_text("weights")
    assert store.adopt(A, again) == store.get(A)


def test_old_store_gets_missing_folders(store: Store) -> None:
    made = commit(store)
    for name in ("runs", "pins", "shared"):
        (store.root / name).rmdir()
    assert Store(store.root).get(A) == made
    assert all((store.root / name).is_dir() for name in ("runs", "pins", "shared"))


def test_other_schema_is_refused(store: Store) -> None:
    (store.root / "schema.json").write_text(json.dumps({"schema": 99}))
    with pytest.raises(EdgepressError, match="schema 99"):
        Store(store.root)


def test_publishing_replaces_only_the_link(store: Store, tmp_path: Path) -> None:
    first, second = commit(store, "a", "one"), commit(store, "b", "two")
    link = publish(first.path, tmp_path / "outputs", "demo", "pruned")
    assert link == tmp_path / "outputs" / "demo" / "pruned" and link.is_symlink()
    assert (link / "model.safetensors").read_text() == "one"
    publish(second.path, tmp_path / "outputs", "demo", "pruned")
    assert (link / "model.safetensors").read_text() == "two"
    assert (first.path / "model.safetensors").read_text() == "one"
    assert [p.name for p in link.parent.iterdir()] == ["pruned"]


def test_file_in_place_of_link_is_refused(store: Store, tmp_path: Path) -> None:
    entry, outputs = commit(store), tmp_path / "outputs"
    publish(entry.path, outputs, "demo", "linked")
    (outputs / "demo" / "own").mkdir()
    (outputs / "demo" / "file").touch()
    check_links(outputs, "demo", ["linked", "new"])
    for name in ("own", "file"):
        with pytest.raises(EdgepressError, match=rf"demo/{name} is in the way .*--outputs"):
            check_links(outputs, "demo", ["linked", name])
    (outputs / "demo" / "own" / "mine").touch()
    with pytest.raises(EdgepressError, match="demo/own cannot become a link"):
        publish(entry.path, outputs, "demo", "own")
    assert sorted(p.name for p in (outputs / "demo").iterdir()) == ["file", "linked", "own"]  # and nothing beside


def test_impossible_links_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EdgepressError, match="--outputs"):
        check_links(tmp_path / "file", "demo", [])


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", "null"])
def test_damaged_schema_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "schema.json").write_text(text)
    with pytest.raises(EdgepressError, match=r"schema\.json is damaged"):
        Store(tmp_path)


def test_unwritable_store_is_named(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EdgepressError, match=r"file/store cannot be written .*--store"):
        Store(tmp_path / "file" / "store")
    (store.root / "locks").rmdir()
    (store.root / "locks").touch()
    with pytest.raises(EdgepressError, match="cannot be written"), store.lock("a"):
        pass


def test_unpublishing_keeps_content(tmp_path: Path) -> None:
    content = tmp_path / "content"
    content.mkdir()
    link = publish(content, tmp_path / "outputs", "recipe", "stage")
    unpublish(tmp_path / "outputs", "recipe", "stage")
    unpublish(tmp_path / "outputs", "recipe", "never-published")
    assert not link.is_symlink() and content.is_dir()
