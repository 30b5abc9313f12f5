"""Entries, records and runs of a store, made in milliseconds."""

from collections.abc import Iterable
from typing import Any

from tasks.store.identity import digest
from tasks.store.journal import Run, RunBase, RunStage
from tasks.store.store import Entry, Store

KNOWN: dict[str, Any] = {"metrics": {"kept_ratio": 0.5}, "seconds": 1.5, "warnings": ["narrow"], "curves": [[1, {"loss": 2.0}]]}
BASE_CONTENT = digest("base")


def document_of(name: str, parents: Iterable[str] = ()) -> dict[str, Any]:
    """The identity document of a stage that reads entries (identities); the first reads the base model, which no store has."""
    return {"uses": "prune.width", "name": name, "inputs": {f"input{i}": identity for i, identity in enumerate([BASE_CONTENT, *parents])}}


def identity_of(name: str, parents: Iterable[str] = ()) -> str:
    return digest(document_of(name, parents))


def commit(store: Store, name: str = "a", text: str = "weights", parents: Iterable[str] = ()) -> Entry:
    identity = identity_of(name, parents)
    out = store.workplace(identity) / "out"
    (out / "sub").mkdir()
    (out / "model.safetensors").write_text(text)
    (out / "sub" / "config.json").write_text("{}")
    return store.commit(identity, document_of(name, parents), **KNOWN)


def put_record(store: Store, content: str, **more: Any) -> str:
    """A measurement of a content; returns its key."""
    key = {"record": "quality", "content": content, **more}
    store.put_record(digest(key), {"key": key, "metrics": {"perplexity": 3.5}})
    return digest(key)


def a_run(recipe: str, identities: Iterable[str], **more: Any) -> Run:
    """What a run of these stages begins its journal with."""
    stages = tuple(RunStage(name=f"s{i}", uses="prune.width", identity=identity) for i, identity in enumerate(identities))
    base = RunBase(source="embedded", identity=BASE_CONTENT, content=BASE_CONTENT)
    return Run(
        recipe=recipe,
        file=f"/{recipe}.yaml",
        text="model: embedded\n",
        directory="/",
        base=base,
        stages=stages,
        **{"outputs": "/nowhere", **more},
    )
