import json
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compression.errors import EdgepressError
from tasks.store.garbage import collect_garbage, find, list_entries, pin, pins, unpin, verify, with_ancestors
from tasks.store.journal import journal, run_names
from tasks.store.store import Store, publish
from tests.tasks.entries import BASE_CONTENT, a_run, commit, identity_of, put_record


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    return tmp_path / "outputs"


def ran(store: Store, recipe: str, identities: list[str], **more: object) -> str:
    """A run that ended well; returns its name."""
    with journal(store, a_run(recipe, identities, **more)) as opened:
        opened.end("Completed")
    return opened.run.run


def removed(store: Store, outputs: Path, keep_last: int = 1, *, dry_run: bool = False) -> set[tuple[str, str]]:
    return {(item.kind, item.name) for item in collect_garbage(store, outputs, keep_last=keep_last, dry_run=dry_run)}


def test_entries_are_listed_with_their_links_and_pins(store: Store, outputs: Path, tmp_path: Path) -> None:
    first, second = commit(store, "a"), commit(store, "b", "longer weights")
    publish(first.path, outputs, "demo", "pruned")
    publish(first.path, tmp_path / "elsewhere", "demo", "pruned")
    ran(store, "demo", [first.identity], outputs=str(tmp_path / "elsewhere"))
    pin(store, second.identity[:8])
    rows = list_entries(store, outputs)
    assert [(row.identity, row.uses, row.content) for row in rows] == [(e.identity, "prune.width", e.content) for e in (first, second)]
    assert sorted(rows[0].names) == ["elsewhere/demo/pruned", "outputs/demo/pruned"] and rows[1].names == ()
    assert [row.pinned for row in rows] == [False, True]
    assert [row.bytes for row in rows] == [
        sum(len(file.read_bytes()) for file in entry.path.parent.rglob("*") if file.is_file()) for entry in (first, second)
    ]
    assert json.loads(json.dumps(rows[0].as_json()))["identity"] == first.identity


def test_verify_quarantines_every_damage(store: Store) -> None:
    whole, flipped = commit(store, "whole"), commit(store, "flipped")
    good, bad, moved = put_record(store, whole.content), put_record(store, "1"), put_record(store, "2")
    ran(store, "demo", [whole.identity])
    assert verify(store).damaged == () and verify(store).entries == 2 and verify(store).records == 3
    (flipped.path / "model.safetensors").write_text("weightz")
    records = store.root / "records"
    (records / f"{bad}.json").write_text((records / f"{bad}.json").read_text().replace("3.5", "2.5"))
    (records / f"{moved}.json").rename(records / f"{'0' * 64}.json")
    (store.root / "runs" / "demo-1.json").write_text("{}")
    found = verify(store)
    assert {what for what, _ in found.damaged} == {f"entry {flipped.identity}", f"record {bad}", f"record {'0' * 64}", "run demo-1"}
    assert "model.safetensors" in dict(found.damaged)[f"entry {flipped.identity}"]
    assert len(list((store.root / "damaged").iterdir())) == 4
    assert store.entries() == [whole.identity] and store.records() == [good] and run_names(store) == []
    assert verify(store).damaged == ()


def test_unneeded_entries_are_collected(store: Store, outputs: Path) -> None:
    shared = commit(store, "shared", "s")
    old, new = commit(store, "old", "o", [shared.identity]), commit(store, "new", "n", [shared.identity])
    other = commit(store, "other", "x")
    about = [put_record(store, content) for content in (shared.content, old.content, BASE_CONTENT)]
    ran(store, "demo", [shared.identity, old.identity])
    ran(store, "demo", [shared.identity, new.identity])
    ran(store, "other", [other.identity])
    gone, stays = publish(old.path, outputs, "demo", "old"), publish(new.path, outputs, "demo", "new")
    expected = {("entry", old.identity), ("record", about[1]), ("link", "demo/old"), ("run", "demo-1")}
    assert removed(store, outputs, keep_last=2) == set()
    assert removed(store, outputs, dry_run=True) == expected
    assert len(store.entries()) == 4 and gone.exists()
    assert removed(store, outputs) == expected
    assert store.entries() == sorted([shared.identity, new.identity, other.identity])
    assert store.records() == sorted([about[0], about[2]]) and run_names(store) == ["demo-2", "other-3"]
    assert not gone.is_symlink() and stays.exists() and list((store.root / "work").iterdir()) == []
    assert removed(store, outputs) == set()
    assert ran(store, "demo", []) == "demo-4"  # numbers are not used again


def test_pins_keep_ancestors(store: Store, outputs: Path) -> None:
    parent = commit(store, "parent", "p")
    child, of_run = commit(store, "child", "c", [parent.identity]), commit(store, "of-run", "r")
    ran(store, "demo", [of_run.identity])
    ran(store, "demo", [])
    assert pin(store, child.identity[:8]) == child.identity and pin(store, "demo-1") == "demo-1"
    assert pins(store) == {child.identity, "demo-1"} and removed(store, outputs) == set()
    assert unpin(store, child.identity[:8]) == child.identity and unpin(store, "demo-1") == "demo-1"
    entries = {("entry", entry.identity) for entry in (parent, child, of_run)}
    assert removed(store, outputs) == {*entries, ("run", "demo-1")}
    with pytest.raises(EdgepressError, match="not pinned; pinned: nothing"):
        unpin(store, "demo-1")


def test_living_and_killed_runs_keep_entries(store: Store, outputs: Path) -> None:
    used, started, unknown = commit(store, "used", "u"), identity_of("started"), identity_of("unknown")
    cache = store.root / "shared" / "teachers" / "key"
    cache.mkdir(parents=True)
    (cache / "hidden.npy").write_text("x")
    with journal(store, a_run("demo", [used.identity, started])) as opened:
        ran(store, "demo", [])
        measured = identity_of("key of a record")
        for name in (started, f"measure-{measured}", unknown, "removed-1234", "dask-1234"):
            (store.root / "work" / name).mkdir()
        with store.lock(unknown), store.lock(measured):  # another process computes and measures, whose journal is not here
            assert removed(store, outputs) == {("work", "removed-1234")}
        assert removed(store, outputs) == {("work", unknown), ("work", f"measure-{measured}")}
        opened.end("Interrupted")
    last = ran(store, "demo", [used.identity, started])
    assert removed(store, outputs) == {("run", "demo-1"), ("run", "demo-2"), ("work", "dask-1234")}
    assert (store.root / "work" / started).is_dir() and cache.is_dir()  # the last run can still go on
    commit(store, "started", "now")
    assert removed(store, outputs) == {("shared", "key")}
    assert run_names(store) == [last] and len(store.entries()) == 2


def test_locked_entries_are_skipped(store: Store, outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identity = identity_of("key of a record")
    (store.root / "work" / f"measure-{identity}").mkdir()
    ran(store, "demo", [])

    def vanishing(folder: Path) -> int:
        raise FileNotFoundError(folder / "a checkpoint that was rotated away")

    with store.lock(identity), monkeypatch.context() as patch:
        patch.setattr("tasks.store.garbage.size_of", vanishing)
        assert removed(store, outputs) == set()
    assert removed(store, outputs) == {("work", f"measure-{identity}")}


def test_quarantine_and_partial_files_are_collected(store: Store, outputs: Path) -> None:
    entry = commit(store)
    ran(store, "demo", [entry.identity])
    (entry.path / "model.safetensors").unlink()
    assert store.get(entry.identity) is None
    half = store.root / "records" / ".key.json.4242"
    half.write_text("{")
    (aside,) = (store.root / "damaged").iterdir()
    assert removed(store, outputs) == {("damaged", aside.name), ("work", half.name)}
    assert not half.exists() and not aside.exists()


def test_store_without_journals_is_not_emptied(store: Store, outputs: Path) -> None:
    entry, other = commit(store, "a"), commit(store, "b")
    with pytest.raises(EdgepressError, match="no run is recorded"):
        removed(store, outputs)
    pin(store, entry.identity)
    assert removed(store, outputs) == {("entry", other.identity)}


def test_unreadable_journal_or_manifest_stops_collection(store: Store, outputs: Path) -> None:
    entry = commit(store)
    name = ran(store, "demo", [entry.identity])
    manifest = entry.path.parent / "manifest.json"
    whole = manifest.read_text()
    manifest.write_text("{")
    with pytest.raises(EdgepressError, match="store verify"):
        removed(store, outputs)
    manifest.write_text(whole)
    (store.root / "runs" / f"{name}.json").write_text("{")
    with pytest.raises(EdgepressError, match="store verify"):
        removed(store, outputs)
    assert store.entries() == [entry.identity]


def test_collection_ignores_clock(store: Store, outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The older run is the one of the future."""
    with monkeypatch.context() as patch:
        patch.setattr("time.time", lambda: 4e9)
        old = commit(store, "old", "o")
        ran(store, "demo", [old.identity], started=4e9)
    new = commit(store, "new", "n")
    ran(store, "demo", [new.identity])
    assert removed(store, outputs) == {("entry", old.identity), ("run", "demo-1")}
    assert [row.identity for row in list_entries(store, outputs)] == [new.identity]


@pytest.mark.parametrize("what", ["demo-2", "abc", "ffffffff", ""])
def test_unknown_name_is_refused(store: Store, what: str) -> None:
    commit(store)
    ran(store, "demo", [])
    with pytest.raises(EdgepressError, match="store ls"):
        find(store, what)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_garbage_is_what_nothing_needs(data: st.DataObject) -> None:
    """Any graph of entries, any runs of any recipes in any order (some alive), any pins: the closure of what is kept stays, all else goes."""
    count = data.draw(st.integers(0, 6), label="entries")
    parents = [data.draw(st.sets(st.integers(0, i - 1)) if i else st.just(set()), label=f"parents of {i}") for i in range(count)]
    some = st.sets(st.integers(0, count - 1)) if count else st.just(set())
    runs = data.draw(st.lists(st.tuples(st.sampled_from(["p", "q"]), some, st.booleans()), max_size=5), label="runs")
    pinned, keep_last = data.draw(some, label="pinned"), data.draw(st.integers(1, 3), label="keep")

    def above(chosen: set[int]) -> set[int]:
        return chosen.union(*(above(parents[i]) for i in chosen))

    with tempfile.TemporaryDirectory() as folder, ExitStack() as living, pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)  # a power cut is no part of this, and a disk is slow
        store = Store(Path(folder) / "store")
        identities: list[str] = []
        for i in range(count):
            identities.append(commit(store, str(i), str(i), [identities[j] for j in sorted(parents[i])]).identity)
        for recipe, stages, alive in runs:
            needs = [identities[i] for i in sorted(stages)]
            if alive:
                opened = living.enter_context(journal(store, a_run(recipe, needs)))
                living.callback(opened.end, "Completed")
            else:
                ran(store, recipe, needs)
        for i in pinned:
            pin(store, identities[i])
        last = [run for recipe in "pq" for run in [r for r in runs if r[0] == recipe][-keep_last:]]
        kept = above(set().union(pinned, *(stages for _, stages, alive in runs if alive), *(stages for _, stages, _ in last)))
        if not runs and not pinned and count:
            with pytest.raises(EdgepressError, match="no run is recorded"):
                collect_garbage(store, Path(folder) / "outputs", keep_last=keep_last, dry_run=False)
            return
        collect_garbage(store, Path(folder) / "outputs", keep_last=keep_last, dry_run=False)
        assert store.entries() == sorted(identities[i] for i in kept)
        assert set(store.entries()) == with_ancestors(store, store.entries())
        assert all(store.get(identities[i]) is not None for i in kept)
