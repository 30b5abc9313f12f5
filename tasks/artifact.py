"""The two files that every artifact has besides the model: `edgepress.json` for machines and a model card for people. Imports no torch.

Both are part of the content, so they contain nothing that differs between two equal runs: no time, no path, no measurement.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compression.checkpoints.checkpoint import file_digests
from compression.files import size_of, write_json
from compression.origin import Origin
from export.proof import KL_TO_PARENT, Change
from tasks.base import Base
from tasks.stage import Artifact
from tasks.store.provenance import CARRIED

CHANGES: Mapping[Change, str] = {
    "float": "in a float type",
    "int8": "rounded to 8 bits, activations while it runs",
    "int8-static": "weights and activations rounded to 8 bits, with ranges from calibration",
    "int4": "rounded to 6 bits or fewer by the exporter",
    "carried": "the quantized checkpoint's own codes, none of them rounded again",
}
RUN: Mapping[str, str] = {  # without `edgepress generate`, which runs them all
    "llama.cpp": """With llama.cpp itself: `llama-cli -m model.gguf -p "Once upon a time" -n 100`""",
    "onnxruntime": """With ONNX Runtime itself: `onnxruntime.InferenceSession("model.onnx")`. The graph takes `input_ids`, `position_ids` and
`past_key_values.*` (empty at first), and returns `logits` and `present.*`, which are the next step's past.""",
    "openvino": """With OpenVINO itself: `openvino.Core().compile_model("model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})`. Without that hint
a processor with AMX computes in bfloat16. The model takes `input_ids`, `position_ids` and `beam_idx` (0, 1, ... of the batch's rows), and
returns `logits`; it keeps the cache in its state, which `reset_state` empties.""",
    "executorch": """With ExecuTorch itself: `executorch.runtime.Runtime.get().load_program("model.pte").load_method("forward")`. It takes one row
of `input_ids` and their `cache_position` (0, 1, ... for a prompt), at most `get_max_seq_len` at a time and `get_max_context_len` in all, and
returns `logits`; it keeps the cache, and a call that starts at 0 begins anew. The program needs XNNPACK in the runtime it is opened with.""",
    "onnxruntime-genai": """With ONNX Runtime GenAI itself:

```python
import onnxruntime_genai as og

model = og.Model(".")
tokenizer = og.Tokenizer(model)
parameters = og.GeneratorParams(model)
parameters.set_search_options(max_length=100)
generator = og.Generator(model, parameters)
generator.append_tokens(tokenizer.encode("Once upon a time"))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
```""",
}


def complete_artifact(
    out: Path,
    planned: Artifact,
    document: dict[str, Any],
    identity: str,
    ancestors: Sequence[tuple[str, dict[str, Any]]],
    base: Base,
) -> None:
    """Write `edgepress.json` and `README.md` into a finished export.

    Args:
        out: The directory of the export.
        planned: What the stage makes.
        document: The identity document of the stage.
        identity: The digest of `document`.
        ancestors: (identity, its document) of every stage before this one, in order; not their names, which decide no bytes.
        base: The model that everything was made from.
    """
    origin = {"source": _source(base), "revision": base.revision, "license": base.license, "content": base.content}
    steps = [{"identity": ancestor, "document": its_document} for ancestor, its_document in ancestors]
    facts = {
        "runtime": planned.runtime,
        "change": planned.change,
        "base": origin,
        "identity": identity,
        "document": document,
        "ancestors": steps,
        "files": {name: sha256 for name, sha256 in file_digests(out).items() if name not in CARRIED},
    }
    write_json(out / "edgepress.json", facts)
    (out / "README.md").write_text(_card(out, planned, document, base, steps))


def origin_of(base: Base) -> Origin:
    """Return the base model as the files of an artifact may name it: without a local path."""
    license_name = None if base.license == "unknown" else base.license
    if base.revision is None:
        return Origin(_source(base), license=license_name)
    organization, name = base.source.split("/")
    return Origin(name, organization, f"https://huggingface.co/{base.source}", base.revision, license_name)


def _card(out: Path, planned: Artifact, document: dict[str, Any], base: Base, steps: list[dict[str, Any]]) -> str:
    revision = f" at revision `{base.revision}`" if base.revision else ""
    source = _source(base)
    documents = [*(step["document"] for step in steps), document]
    lineage = "\n".join(f"{number}. {_step(step)}" for number, step in enumerate(documents, 1))
    bound = KL_TO_PARENT[planned.change]
    return f"""---
license: {base.license}
base_model: {source}
tags: [edgepress, {planned.runtime}]
---
# {source}, compressed for {planned.runtime}

Base model: {source}{revision}, licence `{base.license}`. Made by edgepress: {size_of(out) / 1e6:.2f} MB, weights {CHANGES[planned.change]}.

## Run it

    edgepress generate . -p "Once upon a time" -n 100

{RUN.get(planned.runtime, "")}

## What was done

{lineage}

## How far to trust it

An artifact of this kind is published when it behaves like the checkpoint it was made of, judged on the same tokens in {planned.runtime}: a mean KL divergence
of {bound:g} at most, unless the recipe sets another bound. The measurements stand in the report of the run that made it, not here, so that the same recipe gives
the same files. `edgepress.json` holds the identity of every step, the versions that decided its bytes, and the sha256 of each file;
`edgepress inspect .` checks them.
"""


def _source(base: Base) -> str:
    """Return a name of the base model that means something on other machines."""
    if base.revision:
        return base.source
    return "reference model of edgepress" if base.source == "embedded" else f"local model {base.content[:12]}"


def chosen_parameters(document: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters of a stage's identity document that have a value."""
    return {key: value for key, value in document["parameters"].items() if key != "uses" and value not in (None, False, [], {})}


def _step(document: dict[str, Any]) -> str:
    values = chosen_parameters(document).items()
    text = ", ".join(f"{key} {json.dumps(value) if isinstance(value, list | dict | bool) else value}" for key, value in values)
    return f"`{document['uses']}`" + (f": {text}" if text else "")
