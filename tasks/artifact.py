"""What every artifact carries besides the model: `edgepress.json` for machines and a model card for people. Imports no torch.

Both are part of the content, so they hold nothing that differs between two equal runs: no time, no path, no measurement.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compression.checkpoint import file_digests
from tasks.base import Base
from tasks.files import size_of, write_json
from tasks.stage import Artifact


def complete_artifact(
    out: Path, planned: Artifact, document: dict[str, Any], identity: str, ancestors: Mapping[str, tuple[str, dict[str, Any]]], base: Base
) -> None:
    """Write `edgepress.json` and `README.md` into a finished export.

    ancestors  (identity, its document) of every stage before this one, by name and in order
    """
    origin = {"source": base.source, "revision": base.revision, "license": base.license, "content": base.content}
    steps = [{"stage": name, "identity": digest, "document": known} for name, (digest, known) in ancestors.items()]
    facts = {
        "runtime": planned.runtime, "change": planned.change, "base": origin, "identity": identity, "document": document,
        "ancestors": steps, "files": file_digests(out),
    }  # fmt: skip
    write_json(out / "edgepress.json", facts)
    (out / "README.md").write_text(_card(out, planned, document, base, steps))


def _card(out: Path, planned: Artifact, document: dict[str, Any], base: Base, steps: list[dict[str, Any]]) -> str:
    revision = f" at revision `{base.revision}`" if base.revision else ""
    made = [*(s["document"] for s in steps if "uses" in s["document"]), document]
    road = "\n".join(
        f"{n}. `{d['uses']}` " + ", ".join(f"{k} {v}" for k, v in d["parameters"].items() if k != "uses") for n, d in enumerate(made, 1)
    )
    return f"""---
license: {base.license}
base_model: {base.source}
tags: [edgepress, {planned.runtime}]
---
# {base.source}, compressed for {planned.runtime}

Base model: `{base.source}`{revision}, licence `{base.license}`. Weights: {planned.change}, {size_of(out) / 1e6:.2f} MB. Made by edgepress in these steps:

{road}

`edgepress.json` holds the identity of every step, the versions that decided its bytes, and the sha256 of each file.
"""
