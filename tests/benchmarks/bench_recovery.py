"""How fast training is: `python -m tests.benchmarks.bench_recovery` writes its part of docs/benchmarks.md.

Each comparison takes turns, so that what else the machine does falls on both sides. All train the reference model, or half of it,
on rows of its own data, in float32.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch.nn import functional
from transformers import get_cosine_schedule_with_warmup

from compression.checkpoints.checkpoint import open_checkpoint
from compression.checkpoints.loading import load_model, load_tokenizer
from compression.context import Context
from compression.data import DataSpec, training_rows
from compression.distillation import NEXT_TOKENS, DistillationSettings, Objective, distill
from compression.pruning import DepthSettings, WidthSettings, prune_depth, prune_width
from compression.training import TrainingRows, TrainingRun, TrainingSettings, train
from tasks.base import EMBEDDED
from tasks.measurement.measure import machine_fingerprint
from tests.benchmarks import page

PART = "recovery"
Cached = Literal["none", "full", "top_k"]
UNTIMED = 3  # steps at the start: allocators and caches fill
TURNS = 3
ROWS = 96
CACHES: dict[str, Cached] = {"teacher": "none", "cached, full": "full", "cached, top 64": "top_k"}
ENTROPY = "cross-entropy, the reference model"

Pair = tuple[str, str]  # what is trained, and with what
Run = Callable[[Path, Context], object]


def seconds_per_step(run: Run, steps: int, what: str) -> float:
    """Of the steps after the untimed ones, to the end of the call: its last checkpoint counts.

    what  how the texts of the training's progress begin
    """
    began: list[float] = []

    def progress(step: int, total: int, text: str) -> None:
        if step == UNTIMED and text.startswith(what):
            began.append(time.perf_counter())

    with tempfile.TemporaryDirectory(prefix="edgepress-bench-") as folder:
        run(Path(folder), Context(progress=progress))
        return (time.perf_counter() - began[0]) / (steps - UNTIMED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40, help="of each training; another number is printed, not written")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    body = render(*measure(TrainingSettings(steps=given.steps, batch_size=8, learning_rate=1e-4)), given.threads)
    if given.steps == parser.get_default("steps"):
        page.rewrite(PART, body)
    else:
        print(body)


def measure(settings: TrainingSettings) -> tuple[dict[Pair, list[float]], int]:
    """Tokens per second of every turn, by what was run, and the tokens of a row."""
    data = DataSpec.model_validate("embedded")
    rows = training_rows(data.model_copy(update={"train_documents": 1000}), load_tokenizer(EMBEDDED))[:ROWS]
    tokens = settings.batch_size * rows.shape[1]
    with tempfile.TemporaryDirectory(prefix="edgepress-bench-") as folder:
        neurons, blocks = Path(folder) / "neurons", Path(folder) / "blocks"
        prune_width(EMBEDDED, neurons, WidthSettings(keep=0.5), context=Context())
        prune_depth(EMBEDDED, blocks, DepthSettings(drop=open_checkpoint(EMBEDDED).num_layers // 2), rows[:8], context=Context())
        runs: dict[Pair, tuple[Run, str]] = {
            (ENTROPY, "bare loop"): (lambda place, context: bare_loop(rows, settings, context), "bare"),
            (ENTROPY, "edgepress"): (lambda place, context: our_loop(rows, settings, place, context), "ours"),
        }
        for name, student in (("half of its neurons", neurons), ("half of its blocks", blocks)):
            for way, cache in CACHES.items():
                runs[f"distillation, {name}", way] = (
                    lambda place, context, student=student, cache=cache: distilled(
                        student, rows, settings, place, context, cache, Path(folder) / "cache"
                    ),
                    "distil",
                )
        speeds: dict[Pair, list[float]] = {pair: [] for pair in runs}
        for _ in range(TURNS):
            for pair, (run, what) in runs.items():
                speeds[pair].append(tokens / seconds_per_step(run, settings.steps, what))
    return speeds, rows.shape[1]


def our_loop(rows: torch.Tensor, settings: TrainingSettings, place: Path, context: Context) -> None:
    train(Objective(load_model(EMBEDDED), NEXT_TOKENS), TrainingRows(rows), settings, TrainingRun("ours", {}, place), context=context)


def bare_loop(rows: torch.Tensor, settings: TrainingSettings, context: Context) -> None:
    """The same steps as a script would write them: no checkpoints, no curve."""
    model = load_model(EMBEDDED).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(settings.warmup_ratio * settings.steps), settings.steps)
    order = torch.cat([torch.randperm(len(rows)) for _ in range(settings.steps)])
    for step, chosen in enumerate(order.split(settings.batch_size)[: settings.steps], 1):
        batch = rows[chosen]
        logits = model(input_ids=batch, use_cache=False).logits
        functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        context.progress(step, settings.steps, "bare")


def distilled(
    student: Path, rows: torch.Tensor, settings: TrainingSettings, place: Path, context: Context, cached: Cached, cache: Path
) -> None:  # fmt: skip
    complete = DistillationSettings(**settings.model_dump(), teacher_cache=cached)
    distill(student, EMBEDDED, place / "out", TrainingRows(rows), complete, workdir=place / "work", context=context, cache_folder=cache)


def render(speeds: dict[Pair, list[float]], length: int, threads: int) -> str:
    """The part of the page. The first way to train something is what the others are compared with."""
    machine = machine_fingerprint()
    first: dict[str, Pair] = {}
    for pair in speeds:
        first.setdefault(pair[0], pair)
    rows = [[*pair, *cells(speeds[pair], speeds[first[pair[0]]])] for pair in speeds]
    table = page.markdown(["training", "with", "tokens/s", "lowest", "highest", "times the first"], ["---", "---", *["---:"] * 4], rows)
    return f"""## Training

Written by `make bench-recovery` on {time.strftime("%Y-%m-%d")}: {machine["processor"]}, {machine["cores"]} cores, {threads} threads, float32, \
batches of 8 rows of {length} tokens. Median of {TURNS} turns, each a training of its own, taken in turn; the first {UNTIMED} steps are not counted, \
our last checkpoint is. A cached teacher has been asked about every row before.

{table}"""


def cells(speeds: list[float], first: list[float]) -> list[str]:
    middle = statistics.median(speeds)
    return [*(f"{value:,.0f}" for value in (middle, min(speeds), max(speeds))), f"{middle / statistics.median(first):.2f}"]


if __name__ == "__main__":
    main()
