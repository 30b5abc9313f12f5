"""What a child can be asked to do besides measuring (tasks/measurement/jobs.py): normalise a base, run a stage, bench a model. Works with torch."""

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
    *, stage: dict[str, Any], parent: str, others: dict[str, str], out: str, work: str, data: dict[str, Any], threads: int, context: Context,
    shared: str | None = None, origin: dict[str, Any] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Run a stage into `out`; returns the metrics of its method. Warns of one that its kind does not name.

    Where it fails `out` is removed, for the disk may be full of it, and the reason has to be written down.
    """
    kind = stage_kinds()[stage["uses"]]
    inputs = Inputs(Path(parent), {role: Path(path) for role, path in others.items()}, Origin(**origin) if origin else None)
    place = Workplace(Path(out), Path(work), Path(shared) if shared else None)
    shutil.rmtree(place.out, ignore_errors=True)  # of a child before, whose worker was lost
    place.out.mkdir(parents=True)
    made, spec = kind.model_validate(stage), DataSpec.model_validate(data)
    if made.data_read() in ("calibration", "training"):
        for file in lone_documents(spec, "train"):
            context.warn(
                f"{file} has no blank line, which is where documents of a .txt file end: it is read as one document from its beginning; "
                "put blank lines between its documents, or give .jsonl with one a line"
            )
    try:
        metrics = made.run(inputs, place, spec, context)
    except BaseException:
        shutil.rmtree(place.out, ignore_errors=True)
        raise
    if unnamed := [metric for metric in metrics if not any(fnmatchcase(metric, name) for name in (*kind.metrics, "seconds"))]:
        context.warn(f"{kind.__name__}.metrics does not name {', '.join(unnamed)}, so gates on it are refused")
    return metrics


def bench(*, target: str, prompt: int, new_tokens: int, repeats: int, threads: int, context: Context) -> dict[str, float]:
    """The figures of `measure_speed` for a prompt of a given length. What it says does not matter: every vocabulary has ids up to 255."""
    from compression.evaluation.speed import measure_speed as measure
    from export.runtimes import import_runtime, open_runtime, runtime_name

    import_runtime(runtime_name(Path(target)))
    tokens = [2 + 7 * position % 250 for position in range(prompt)]
    return measure(
        lambda: open_runtime(Path(target), device=context.device, threads=threads), tokens, new_tokens=new_tokens, repeats=repeats
    )
