"""`edgepress bench`: compare the speed of artifacts and checkpoints on this machine."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from compression.errors import EdgepressError, Incompatible
from export.runtimes import check_installed, installed_runtimes, runtime_name
from tasks.errors import JobFailed
from tasks.measurement.figures import most_contended
from tasks.measurement.measure import machine_fingerprint
from tasks.runners.budget import Budget
from tasks.runners.executor import Executor, Job
from tasks.runners.local import LocalExecutor

_BUSY = "timed while other programs had the cores, so it may be faster than this says"


@dataclass(frozen=True)
class BenchRow:
    """One model with one length of prompt: figures as `measure_speed` names them, or the reason for having none."""

    model: str
    runtime: str
    prompt: int
    new: int
    figures: dict[str, float]
    reason: str = ""
    failed: bool = False


def parse_lengths(text: str) -> list[int]:
    """Parse lengths such as "32,128". Raises Incompatible for anything else."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise Incompatible(f"--prompt {text!r} is not a list of lengths such as 32,128", key="prompt")
    return [int(part) for part in parts]


def measure_rows(
    models: Sequence[Path],
    prompts: Sequence[int],
    *,
    new_tokens: int,
    repeats: int,
    threads: int,
    on_start: Callable[[str], None],
) -> Iterator[BenchRow]:
    """Measure every model with every prompt length, each in a process of its own and exclusively on the machine. A crash ends only its row.

    Args:
        models: Checkpoints, artifacts, GGUF files.
        prompts: Lengths in tokens.
        new_tokens: Tokens to generate.
        repeats: Measured generations, after a warm-up.
        threads: Threads of every computation.
        on_start: Called with a description of each measurement before it starts.

    Raises:
        UnusableModel, MissingExtra: Before anything is measured.
    """
    runtimes = {model: runtime_name(model) for model in models}
    for name in runtimes.values():
        check_installed(name)
    executor = LocalExecutor(Budget(threads))
    executor.preload()
    try:
        for model, runtime in runtimes.items():
            for prompt in prompts:
                on_start(f"{model} in {runtime}, prompt of {prompt} (starts when no other work of edgepress runs on this machine)")
                yield _measure(executor, model, runtime, prompt, new_tokens, repeats, threads)
    finally:
        executor.close()


def _measure(executor: Executor, model: Path, runtime: str, prompt: int, new_tokens: int, repeats: int, threads: int) -> BenchRow:
    arguments = {"target": str(model.absolute()), "prompt": prompt, "new_tokens": new_tokens, "repeats": repeats}
    job = Job("tasks.runners.jobs:bench", arguments, threads, exclusive=True)
    with tempfile.TemporaryDirectory(prefix="edgepress-bench-") as folder:
        try:
            figures = executor.run(job, Path(folder), lambda _: None).metrics
        except (EdgepressError, JobFailed) as error:
            return BenchRow(str(model), runtime, prompt, new_tokens, {}, str(error), failed=True)
    reason = "" if figures else "not timed: this layout has no fast kernel here"
    return BenchRow(str(model), runtime, prompt, new_tokens, figures, reason)


def bench_table(rows: Sequence[BenchRow], *, threads: int, repeats: int) -> Table:
    """Build the table of the rows."""
    title = f"{threads} thread{'s' * (threads > 1)}, medians of {repeats} after a warm-up (slowest–fastest)"
    table = Table(title=title)
    for name in ("model", "runtime"):
        table.add_column(name, overflow="fold")
    for name in ("prompt", "new", "prefill t/s", "first token ms", "decode t/s", "load s", "memory MB"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(escape(row.model), row.runtime, str(row.prompt), str(row.new), *_cells(row.figures))
    return table


def remarks(rows: Sequence[BenchRow]) -> list[str]:
    """Explain why rows are empty or doubtful, once each."""
    reasons = [(row, row.reason or (_BUSY if most_contended(row.figures) else "")) for row in rows]
    return list(dict.fromkeys(f"{row.model}: {reason}" for row, reason in reasons if reason))


def _cells(f: dict[str, float]) -> list[str]:
    if not f:
        return []
    low, high = f["tokens_per_second_low"], f["tokens_per_second_high"]
    memory = f"{f['peak_memory_mb']:.0f}" if "peak_memory_mb" in f else ""
    decode = f"{f['tokens_per_second']:.0f} ({low:.0f}–{high:.0f})"
    return [f"{f['prefill_tokens_per_second']:.0f}", f"{1000 * f['first_token_seconds']:.1f}", decode, f"{f['load_seconds']:.2f}", memory]


def bench_document(rows: Sequence[BenchRow], *, threads: int, repeats: int) -> dict[str, Any]:
    """Return the rows as JSON: figures in seconds, tokens/s and 10^6 bytes."""
    versions = installed_runtimes()
    documents = [
        {
            "model": row.model, "runtime": row.runtime, "runtime_version": versions[row.runtime], "prompt": row.prompt, "new": row.new,
            **row.figures, **({"reason": row.reason, "failed": row.failed} if row.reason else {}),
        }
        for row in rows
    ]  # fmt: skip
    return {"machine": machine_fingerprint(), "threads": threads, "repeats": repeats, "rows": documents}
