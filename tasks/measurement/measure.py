"""Records: what was measured of a checkpoint or artifact, when, and under which key. Imports no torch.

The key of a record covers the bytes, the runtime's version (and torch's), the device, the threads, and what its measurement names
(tasks/measurement/kinds.py); figures of time and energy also depend on the machine. Comparisons with the base are records as well, computed from two
others without another measurement.
"""

import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from compression.evaluation.findings import Items
from compression.files import size_of
from export.runtimes import installed_runtimes, runtime_name
from tasks.measurement.kinds import MEASUREMENTS
from tasks.measurement.measurement import Measurement, MeasurementRequest, Subject
from tasks.runners.executor import EventHandler, Executor, Job
from tasks.store.identity import digest
from tasks.store.store import Store


@lru_cache(maxsize=1)
def machine_fingerprint() -> dict[str, Any]:
    """Describe what speed depends on: the processor, its cores, the memory, the graphics cards, the host's name."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = next((line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")), model)
    cards = sorted(
        line.split(":", 1)[1].strip()
        for card in Path("/proc/driver/nvidia/gpus").glob("*/information")
        for line in card.read_text().splitlines()
        if line.startswith("Model:")
    )
    return {
        "host": platform.node(), "processor": model, "cores": os.cpu_count(), "memory_gib": round(psutil.virtual_memory().total / 2**30),
        **({"cards": cards} if cards else {}),
    }  # fmt: skip


@dataclass
class Measured:
    """What was measured of a target.

    Attributes:
        metrics: By name, with the intervals of those that have items.
        items: Of metrics, by name.
        keys: Of the records, by the names of the measurements' parts.
        details: What measurements keep besides (texts, per-item results), by its own keys.
        seconds: How long children worked on it in this run; 0 where the store had every record.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    items: dict[str, Items] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def measure(
    subject: Subject, store: Store, executor: Executor, on_event: EventHandler, *, remeasure: bool = False, order: int = 0
) -> Measured:
    """Collect every record that the recipe wants of a target, from the store where it has one.

    Args:
        subject: The target, with what it is compared with.
        store: Keeps the records.
        executor: Runs the jobs of missing records.
        on_event: Gets the events of these jobs.
        remeasure: Take the timings again, even if the store has them; new ones replace the stored ones.
        order: The order of the jobs among those of other stages.
    """
    result = Measured()
    for measurement in MEASUREMENTS:
        for name, request in measurement.parts(subject.request).items():
            key, record, seconds = _record(
                measurement, replace(subject, request=request), store, executor, on_event,
                remeasure=remeasure and measurement.exclusive, order=order,
            )  # fmt: skip
            result.metrics |= record["metrics"]
            result.items |= {metric: Items.read(items) for metric, items in record["items"].items()}
            result.details |= record["details"]
            result.keys[name] = key
            result.seconds += seconds
    return result


def _record(
    measurement: Measurement, subject: Subject, store: Store, executor: Executor, on_event: EventHandler, *, remeasure: bool, order: int
) -> tuple[str, dict[str, Any], float]:  # fmt: skip
    """A record with its key, and the seconds that a child worked on it in this run."""
    from compression.evaluation.bootstrap import BOOTSTRAP_VERSION, interval_figures

    runtime = runtime_name(subject.target.path)
    document = {
        "record": measurement.name, "version": measurement.version, "content": subject.target.content, "runtime": runtime,
        "runtime_version": installed_runtimes()[runtime], "device": subject.machine.device, "threads": subject.machine.threads,
        **({"torch": version("torch")} if runtime == "transformers" else {}), "bootstrap": BOOTSTRAP_VERSION,
        **({"machine": machine_fingerprint()} if measurement.exclusive else {}),
        **measurement.document(subject.request, subject.references),
    }  # fmt: skip

    def compute() -> tuple[dict[str, Any], float]:
        folder = store.root / "work" / f"measure-{digest(document)}"  # only the holder of the key's lock uses it
        job_result = executor.run(make_job(measurement, subject, order), folder, on_event)
        shutil.rmtree(folder, ignore_errors=True)
        metrics = dict(job_result.metrics)
        for metric, items in job_result.items.items():
            metrics |= interval_figures(metric, items, f"{digest(document)} {metric}")
        stored = {metric: asdict(items) for metric, items in job_result.items.items()}
        return {"metrics": metrics, "items": stored, "details": job_result.details, "seconds": job_result.seconds}, job_result.seconds

    return _stored(store, document, compute, lambda: executor.closed, recompute=remeasure)


def make_job(measurement: Measurement, subject: Subject, order: int = 0) -> Job:
    """Return the job of a measurement, which a child runs."""
    arguments = {
        "measurement": measurement.name,
        "target": str(subject.target.path),
        "tokenizer": str(subject.tokenizer),
        "references": {role: str(reference.path) for role, reference in subject.references.items()} if measurement.compares else {},
        "data": subject.request.data.model_dump(mode="json"),
        "evaluation": subject.request.evaluation.model_dump(mode="json"),
    }
    opened = {subject.target.path, *(reference.path for reference in subject.references.values())}
    memory = 2 * sum(size_of(path) for path in opened)  # files hold 16 bits a weight, runtimes compute with 32
    return Job(
        "tasks.measurement.jobs:measure", arguments, subject.machine.threads, device=subject.machine.device, exclusive=measurement.exclusive,
        name=measurement.name, memory=memory, order=order,
    )  # fmt: skip


def compare(target: Measured, base: Measured, content: str, store: Store) -> dict[str, float]:
    """Return differences and ratios to the base, with intervals, of every metric that has items in both: from the store, or computed and kept.

    Args:
        target: What was measured of the checkpoint or artifact.
        base: What was measured of the base.
        content: Digest of the target's bytes; the record is kept as long as these.
        store: Keeps the record.
    """
    from compression.evaluation.bootstrap import BOOTSTRAP_VERSION, comparison_figures

    shared = sorted(target.items.keys() & base.items.keys())
    # Timings can be taken again under the same key, so the items belong to the key of the comparison.
    items = {metric: [asdict(target.items[metric]), asdict(base.items[metric])] for metric in shared}
    document = {
        "record": "comparison", "version": BOOTSTRAP_VERSION, "content": content, "of": target.keys, "with": base.keys, "items": digest(items),
        "metrics": shared,
    }  # fmt: skip

    def compute() -> tuple[dict[str, Any], float]:
        metrics: dict[str, float] = {}
        for metric in shared:
            metrics |= comparison_figures(metric, target.items[metric], base.items[metric], f"{digest(document)} {metric}")
        return {"metrics": metrics}, 0.0

    return _stored(store, document, compute)[1]["metrics"] if shared else {}


def _stored(
    store: Store,
    document: dict[str, Any],
    compute: Callable[[], tuple[dict[str, Any], float]],
    is_cancelled: Callable[[], bool] = lambda: False,
    *,
    recompute: bool = False,
) -> tuple[str, dict[str, Any], float]:
    """The key of a document, its record, and the seconds spent on it in this run; `compute` gives a record that the store does not have.

    Raises Cancelled where `is_cancelled` returns True while another process holds the key.
    """
    key = digest(document)
    with store.lock(key, is_cancelled):
        record = None if recompute else store.record(key)
        seconds = 0.0
        if record is None:
            computed, seconds = compute()
            record = {"key": document, **computed, "measured": time.time()}
            store.put_record(key, record)
    return key, record, seconds


def known_metrics(request: MeasurementRequest) -> Mapping[str, None]:
    """Return the names of all metrics that measuring may give, in order; `*` in a name stands for a part that only the result has."""
    names: dict[str, None] = {}
    base_request = replace(request, roles=())
    for measurement in MEASUREMENTS:
        if not measurement.applies(request):
            continue
        compared = measurement.metrics(base_request) if "base" in request.roles else {}
        for metric, transform in measurement.metrics(request).items():
            names[metric] = None
            if transform is not None:
                names |= dict.fromkeys((f"{metric}_low", f"{metric}_high"))
                if metric in compared:
                    figure = f"{metric}_{'ratio' if transform == 'exp' else 'delta'}"
                    names |= dict.fromkeys((figure, f"{figure}_low", f"{figure}_high"))
    return names
