import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from compression.errors import EdgepressError
from tasks.store import Entry, Store, publish, withdraw

KNOWN: dict[str, Any] = {"metrics": {"kept_ratio": 0.5}, "seconds": 1.5, "warnings": ["narrow"], "curves": [[1, {"loss": 2.0}]]}


def commit(store: Store, identity: str = "a" * 64, text: str = "weights") -> Entry:
    out = store.workplace(identity) / "out"
    (out / "sub").mkdir()
    (out / "model.safetensors").write_text(text)
    (out / "sub" / "config.json").write_text("{}")
    return store.commit(identity, {"uses": "x"}, **KNOWN)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_what_was_committed_comes_back(store: Store) -> None:
    made = commit(store)
    found = store.get("a" * 64)
    assert found is not None and found == made
    assert (found.path / "model.safetensors").read_text() == "weights"
    assert found.manifest["identity"] == {"uses": "x"}
    assert {key: found.manifest[key] for key in KNOWN} == KNOWN
    assert set(found.manifest["files"]) == {"model.safetensors", "sub/config.json"}
    assert not (store.root / "work" / ("a" * 64)).exists()
    assert store.has("a" * 64) and store.entries() == ["a" * 64]


def test_equal_bytes_have_equal_content_under_any_identity(store: Store) -> None:
    assert commit(store, "a" * 64).content == commit(store, "b" * 64).content != commit(store, "c" * 64, "other").content


def test_a_sha256_of_the_manifest_is_sha256sums(store: Store) -> None:
    entry = commit(store)
    told = subprocess.run(["sha256sum", entry.path / "model.safetensors"], capture_output=True, text=True, check=True).stdout.split()[0]
    assert entry.manifest["files"]["model.safetensors"] == told


@pytest.mark.parametrize("moment", ["fsync_tree", "write_json"])
def test_a_commit_that_is_broken_off_leaves_nothing_that_is_taken_for_whole(
    store: Store, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def power_cut(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(f"tasks.store.{moment}", power_cut)
        commit(store)
    assert store.get("a" * 64) is None and not store.has("a" * 64) and store.entries() == []
    commit(store)
    assert store.get("a" * 64) is not None


def test_a_workplace_is_empty_but_for_what_a_killed_run_left_to_go_on_from(store: Store) -> None:
    home = store.workplace("a")
    (home / "out" / "half").write_text("")
    (home / "work" / "checkpoint-2").mkdir()
    (home / "commit-1234").mkdir()
    again = store.workplace("a")
    assert again == home
    assert list((home / "out").iterdir()) == []
    assert sorted(p.name for p in home.iterdir()) == ["out", "work"]
    assert (home / "work" / "checkpoint-2").is_dir()


def flip(entry: Entry) -> None:
    (entry.path / "model.safetensors").write_text("weightz")


def cut(entry: Entry) -> None:
    (entry.path / "sub" / "config.json").unlink()


def add(entry: Entry) -> None:
    (entry.path / "new").touch()


def halve_manifest(entry: Entry) -> None:
    manifest = entry.path.parent / "manifest.json"
    manifest.write_text(manifest.read_text()[:40])


def lose_manifest(entry: Entry) -> None:
    (entry.path.parent / "manifest.json").unlink()


@pytest.mark.parametrize("damage", [flip, cut, add, halve_manifest, lose_manifest])
def test_a_damaged_entry_is_set_aside_and_can_be_made_again(store: Store, damage: Any) -> None:
    damage(commit(store))
    assert store.get("a" * 64) is None
    assert [p.name.split(".")[0] for p in (store.root / "damaged").iterdir()] == ["a" * 64]
    assert store.entries() == []
    assert commit(store) == store.get("a" * 64)


def test_the_lock_excludes_other_processes_and_dies_with_its_owner(store: Store) -> None:
    code = "import sys\nfrom pathlib import Path\nfrom tasks.store import Store\nwith Store(Path(sys.argv[1])).lock('x'):\n    print('held', flush=True); sys.stdin.read()"
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
    thread.join(20)
    assert entered.is_set()


def test_records_come_back_and_an_unreadable_one_counts_as_absent(store: Store) -> None:
    assert store.record("k") is None
    store.put_record("k", {"metrics": {"perplexity": 3.5}})
    assert store.record("k") == {"metrics": {"perplexity": 3.5}}
    (store.root / "records" / "k.json").write_text('{"metr')
    assert store.record("k") is None
    store.put_record("k", {"metrics": {}})
    assert store.record("k") == {"metrics": {}}
    assert len(list((store.root / "damaged").iterdir())) == 1


def test_a_store_of_another_schema_is_refused(store: Store) -> None:
    (store.root / "schema.json").write_text(json.dumps({"schema": 99}))
    with pytest.raises(EdgepressError, match="schema 99"):
        Store(store.root)


def test_publishing_replaces_the_link_and_leaves_the_content_alone(store: Store, tmp_path: Path) -> None:
    first, second = commit(store, "a" * 64, "one"), commit(store, "b" * 64, "two")
    link = publish(first.path, tmp_path / "outputs", "demo", "pruned")
    assert link == tmp_path / "outputs" / "demo" / "pruned" and link.is_symlink()
    assert (link / "model.safetensors").read_text() == "one"
    publish(second.path, tmp_path / "outputs", "demo", "pruned")
    assert (link / "model.safetensors").read_text() == "two"
    assert (first.path / "model.safetensors").read_text() == "one"
    assert [p.name for p in link.parent.iterdir()] == ["pruned"]


def test_a_withdrawn_link_is_gone_and_its_content_stays(tmp_path: Path) -> None:
    content = tmp_path / "content"
    content.mkdir()
    link = publish(content, tmp_path / "outputs", "recipe", "stage")
    withdraw(tmp_path / "outputs", "recipe", "stage")
    withdraw(tmp_path / "outputs", "recipe", "never-published")
    assert not link.is_symlink() and content.is_dir()
