import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
from moto.server import ThreadedMotoServer

from compression.errors import EdgepressError, MissingExtra
from tasks.store.store import Store
from tasks.store.transfer import export_entries, import_entries
from tests.tasks.entries import commit, identity_of, put_record


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A parent with two records, and its child."""
    made = Store(tmp_path / "store")
    parent = commit(made, "parent", "p")
    child = commit(made, "child", "c", [parent.identity])
    for content, more in [(parent.content, 1), (parent.content, 2), (child.content, 1), ("elsewhere", 1)]:
        put_record(made, content, more=more)
    return made


PARENT = identity_of("parent")
CHILD = identity_of("child", [PARENT])


@pytest.fixture
def other(tmp_path: Path) -> Store:
    return Store(tmp_path / "other")


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The URL of a bucket on a server that speaks S3."""
    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "k",
        "AWS_SECRET_ACCESS_KEY": "s",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir("models")
        yield "s3://models"
    server.stop()


@pytest.fixture(params=["path", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh place for an export."""
    if request.param == "s3":
        return f"{request.getfixturevalue('s3')}/{tmp_path.name}"
    return str(tmp_path / "carried") if request.param == "path" else f"memory://{tmp_path.name}"


@pytest.mark.parametrize("form", ["edgepress.tar", "results"])
def test_export_is_imported_with_records(store: Store, other: Store, place: str, form: str) -> None:
    url = f"{place}/{form}"
    done = export_entries(store, url, [PARENT, CHILD])
    assert (done.entries, done.present, done.records) == (tuple(sorted([PARENT, CHILD])), (), 3)
    taken = import_entries(other, url)
    assert (taken.entries, taken.present, taken.records) == (tuple(sorted([PARENT, CHILD])), (), 3)
    for identity in (PARENT, CHILD):
        assert other.get(identity).manifest == store.get(identity).manifest  # type: ignore[union-attr]
    assert len(other.records()) == 3 and all(other.record(key) == store.record(key) for key in other.records())
    assert list((other.root / "work").iterdir()) == []
    again = import_entries(other, url)
    assert (again.entries, set(again.present), again.records) == ((), {PARENT, CHILD}, 0)


def test_chosen_entry_is_exported_alone(store: Store, other: Store, tmp_path: Path) -> None:
    export_entries(store, str(tmp_path / "x.tar"), [CHILD])
    assert import_entries(other, str(tmp_path / "x.tar")).records == 1 and other.entries() == [CHILD]


def test_exported_directory_grows_and_is_a_store(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    assert export_entries(store, str(folder), [PARENT]).entries == (PARENT,)
    second = export_entries(store, str(folder), [PARENT, CHILD])
    assert (second.entries, second.present, second.records) == ((CHILD,), (PARENT,), 1)
    opened = Store(folder)
    assert opened.entries() == store.entries() and all(opened.get(identity) for identity in opened.entries())


def test_store_directory_can_be_imported(store: Store, other: Store) -> None:
    (store.root / "records" / ".half.json.12").write_text("{")
    (store.root / "objects" / ("0" * 64) / "content").mkdir(parents=True)  # of an export that broke off: no manifest yet
    taken = import_entries(other, str(store.root))
    assert len(taken.entries) == 2 and taken.records == 4 and other.entries() == sorted([PARENT, CHILD])


def test_equal_entries_make_equal_tars(store: Store, tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        export_entries(store, str(tmp_path / name), [CHILD, PARENT] if name == "a.tar" else [PARENT, CHILD])
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_damaged_entry_is_not_exported(store: Store, tmp_path: Path) -> None:
    (store.root / "objects" / CHILD / "content" / "model.safetensors").write_text("C")
    with pytest.raises(EdgepressError, match=f"{CHILD} .* damaged"):
        export_entries(store, str(tmp_path / "x.tar"), [PARENT, CHILD])
    assert not (tmp_path / "x.tar").exists()


@pytest.mark.parametrize("form", ["x.tar", "x"])
def test_damaged_export_is_refused(store: Store, other: Store, tmp_path: Path, form: str) -> None:
    """A manifest that fits its files, but another identity; then a file that does not fit its manifest."""
    manifest = store.root / "objects" / CHILD / "manifest.json"
    whole = manifest.read_text()
    url = str(tmp_path / form)
    for text in (whole.replace('"prune.width"', '"prune.depth"'), whole.replace('"sub/config.json"', '"sub/other.json"')):
        folder = tmp_path / "laid-out"
        export_entries(store, str(folder), [PARENT, CHILD])
        (folder / "objects" / CHILD / "manifest.json").write_text(text)
        if form == "x.tar":
            pack(folder, Path(url))
        else:
            folder.rename(url)
        with pytest.raises(EdgepressError, match=f"{CHILD} is damaged"):
            import_entries(other, url)
        assert CHILD not in other.entries() and list((other.root / "work").iterdir()) == []
        shutil.rmtree(url) if form == "x" else shutil.rmtree(folder)


def pack(folder: Path, tar: Path, *, listed: bool = True) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "schema.json")
    names = [path.relative_to(folder).as_posix() for path in files]
    with tarfile.open(tar, "w") as out:
        for path, name in zip(files, names, strict=True):
            out.add(path, name)
        if listed:
            text = json.dumps({"schema": 1, "members": names}).encode()
            member = tarfile.TarInfo("export.json")
            member.size = len(text)
            out.addfile(member, io.BytesIO(text))


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_truncated_tar_is_refused(store: Store, other: Store, tmp_path: Path, share: float) -> None:
    tar = tmp_path / "x.tar"
    export_entries(store, str(tar), [PARENT, CHILD])
    content = tar.read_bytes().rstrip(b"\0")
    tar.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(EdgepressError, match=r"x\.tar"):
        import_entries(other, str(tar))
    assert other.entries() == [] and other.records() == [] and list((other.root / "work").iterdir()) == []


def test_tar_without_list_is_refused(store: Store, other: Store, tmp_path: Path) -> None:
    """Cut exactly between two members, which tar itself does not notice."""
    export_entries(store, str(tmp_path / "x"), [PARENT])
    pack(tmp_path / "x", tmp_path / "x.tar", listed=False)
    with pytest.raises(EdgepressError, match="incomplete"):
        import_entries(other, str(tmp_path / "x.tar"))
    assert other.entries() == []


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/outside", f"objects/{PARENT}/content/../../../outside", "objects/short/manifest.json", f"objects/{PARENT}/content//x"]
)  # fmt: skip
def test_member_outside_store_is_refused(other: Store, tmp_path: Path, name: str) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as out:
        out.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(EdgepressError, match="does not belong"):
        import_entries(other, str(tmp_path / "x.tar"))
    assert not list(tmp_path.rglob("outside"))


def test_link_in_tar_is_refused(other: Store, tmp_path: Path) -> None:
    member = tarfile.TarInfo(f"objects/{PARENT}/content/model.safetensors")
    member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(tmp_path / "x.tar", "w") as out:
        out.addfile(member)
    with pytest.raises(EdgepressError, match="plain file"):
        import_entries(other, str(tmp_path / "x.tar"))


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("absent.tar", "absent.tar"),
        ("absent", "no schema.json"),
        ("nothing://x", "nothing"),
        ("s3://no-such-bucket/x.tar", "no-such-bucket"),
    ],
)
def test_missing_source_is_named(other: Store, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EdgepressError, match=words):
        import_entries(other, url)


def test_missing_bucket_is_not_created(store: Store, s3: str) -> None:
    for form in ("x.tar", "x"):
        with pytest.raises(EdgepressError, match="no-such-bucket"):
            export_entries(store, f"s3://no-such-bucket/{form}", [PARENT])
    assert fsspec.filesystem("s3").ls("") == ["models"]


def test_unreachable_server_is_named(other: Store, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(EdgepressError, match="s3://models/x"):
        import_entries(other, "s3://models/x.tar")
    fsspec.filesystem("s3").clear_instance_cache()


def test_missing_s3_package_is_named(other: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(MissingExtra, match=r"s3fs.*edgepress\[s3\]"):
        import_entries(other, "s3://models/x.tar")


def test_disk_space_is_checked_first(store: Store, other: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for form in ("x", "x.tar"):
        export_entries(store, str(tmp_path / form), [PARENT])
        with monkeypatch.context() as patch, pytest.raises(EdgepressError, match=r"has 0\.0 GB free"):
            patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
            import_entries(other, str(tmp_path / form))
    assert other.entries() == []


def test_export_of_other_schema_is_refused(store: Store, other: Store, tmp_path: Path) -> None:
    export_entries(store, str(tmp_path / "x"), [PARENT])
    (tmp_path / "x" / "schema.json").write_text('{"schema": 99}')
    with pytest.raises(EdgepressError, match="schema 99"):
        import_entries(other, str(tmp_path / "x"))
    with pytest.raises(EdgepressError, match="schema 99"):
        export_entries(store, str(tmp_path / "x"), [CHILD])
    for text in ("{", "[]", "{}"):
        (tmp_path / "x" / "schema.json").write_text(text)
        with pytest.raises(EdgepressError, match=r"schema\.json"):
            import_entries(other, str(tmp_path / "x"))
