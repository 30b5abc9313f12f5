"""The jobs of a child besides measuring (tasks/measurement/jobs.py): normalise a base, run a stage, bench a model. Imports torch inside functions."""

import shutil
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from compression.context import Context
from compression.data import DataSpec
from compression.data.sources import lone_documents
from compression.evaluation.findings import Findings
from compression.origin import Origin
from tasks.stage import Inputs, Workplace, stage_kinds


def normalize_base(*, source: str, out: str, threads: int, context: Context) -> Findings:
    """Normalise a base model into the directory `out`; its details are those of `Normalized`."""
    from compression.checkpoints.normalization import normalize

    return Findings({}, details=asdict(normalize(Path(source), Path(out))))


def compute_stage(
    *,
    stage: dict[str, Any],
    inputs: dict[str, Any],
    place: dict[str, str],
    data: dict[str, Any],
    threads: int,
    context: Context,
) -> dict[str, float]:
    """Run a stage, and warn of metrics that its kind does not declare.

    A stage that fails leaves no `out`: it may have filled the disk, and the child must still write the reason.

    Args:
        stage: `uses` and the parameters of the stage.
        inputs: The fields of `Inputs` as JSON: `parent`, and optionally `others` and `origin`.
        place: The fields of `Workplace` as JSON: `out`, `work`, and optionally `shared`.
        data: The recipe's data.
        threads: The threads of torch, set by the worker.
        context: Seed, device, progress and warnings.

    Returns:
        The metrics of the stage's method.
    """
    kind = stage_kinds()[stage["uses"]]
    others = {role: Path(path) for role, path in inputs.get("others", {}).items()}
    sources = Inputs(Path(inputs["parent"]), others, Origin(**inputs["origin"]) if inputs.get("origin") else None)
    workplace = Workplace(**{name: Path(path) for name, path in place.items()})
    shutil.rmtree(workplace.out, ignore_errors=True)  # a lost child may have left an incomplete one
    workplace.out.mkdir(parents=True)
    definition, spec = kind.model_validate(stage), DataSpec.model_validate(data)
    if definition.data_read() in ("calibration", "training"):
        for file in lone_documents(spec, "train"):
            context.warn(
                f"{file} has no blank line, which is where documents of a .txt file end: it is read as one document from its beginning; "
                "put blank lines between its documents, or give .jsonl with one a line"
            )
    try:
        metrics = definition.run(sources, workplace, spec, context)
    except BaseException:
        shutil.rmtree(workplace.out, ignore_errors=True)
        raise
    if unnamed := [metric for metric in metrics if not any(fnmatchcase(metric, name) for name in (*kind.metrics, "seconds"))]:
        context.warn(f"{kind.__name__}.metrics does not name {', '.join(unnamed)}, so gates on it are refused")
    return metrics


def bench(*, target: str, prompt: int, new_tokens: int, repeats: int, threads: int, context: Context) -> dict[str, float]:
    """Return the metrics of `measure_speed` for a prompt of a given length. Its tokens are arbitrary: every vocabulary has ids up to 255."""
    from compression.evaluation.speed import measure_speed as measure
    from export.runtimes import import_runtime, open_runtime, runtime_name

    import_runtime(runtime_name(Path(target)))
    tokens = [2 + 7 * position % 250 for position in range(prompt)]
    return measure(
        lambda: open_runtime(Path(target), device=context.device, threads=threads), tokens, new_tokens=new_tokens, repeats=repeats
    )
