"""Records: what was measured about a checkpoint or artifact, when, and under which key. Imports no torch.

Every record depends on the bytes, the runtime's version (and torch's), the device and the threads, and on what its measurement names
(tasks/measurement/kinds); one that is taken alone on the machine depends on the machine too. Comparisons with the base are records as well, computed
from two others without another measurement.
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
from tasks.measurement.measurement import Measurement, MeasurementRequest, Subject, measurements
from tasks.runners.executor import EventHandler, Executor, Job
from tasks.store.identity import digest
from tasks.store.store import Store


@lru_cache(maxsize=1)
def machine_fingerprint() -> dict[str, Any]:
    """What speed depends on: the processor, its cores, the memory, the graphics cards, the host's name."""
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
    """What is known of a target.

    metrics  by name, with the intervals of those that have items
    items    of metrics, by name
    keys     of the records, by the names of the measurements' parts
    details  what measurements keep besides (texts, per-item results), by its own keys
    seconds  that children worked for it now: 0 when every record was there already
    """

    metrics: dict[str, float] = field(default_factory=dict)
    items: dict[str, Items] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def measure(subject: Subject, store: Store, executor: Executor, on_event: EventHandler, *, again: bool = False, order: int = 0) -> Measured:
    """Every record that the recipe asks for about a target: from the store, or made now and kept. `again`: what is taken alone is made now, and takes
    the place of what the store has. `order`: that of its jobs."""
    found = Measured()
    for measurement in measurements():
        parts = measurement.parts(subject.asked) if measurement.applies(subject.asked) else {}
        for name, asked in parts.items():
            key, record, seconds = _record(
                measurement, replace(subject, asked=asked), store, executor, on_event, again=again and measurement.exclusive, order=order
            )
            found.metrics |= record["metrics"]
            found.items |= {metric: Items.read(items) for metric, items in record["items"].items()}
            found.details |= record["details"]
            found.keys[name] = key
            found.seconds += seconds
    return found


def _record(
    measurement: Measurement, subject: Subject, store: Store, executor: Executor, on_event: EventHandler, *, again: bool, order: int
) -> tuple[str, dict[str, Any], float]:  # fmt: skip
    """A record with its key, and the seconds a child worked for it now."""
    from compression.evaluation.bootstrap import BOOTSTRAP_VERSION, interval_figures

    name = runtime_name(subject.target.path)
    document = {
        "record": measurement.name, "version": measurement.version, "content": subject.target.content, "runtime": name,
        "runtime_version": installed_runtimes()[name], "device": subject.machine.device, "threads": subject.machine.threads,
        **({"torch": version("torch")} if name == "transformers" else {}), "bootstrap": BOOTSTRAP_VERSION,
        **({"machine": machine_fingerprint()} if measurement.exclusive else {}), **measurement.document(subject),
    }  # fmt: skip

    def made() -> tuple[dict[str, Any], float]:
        call, arguments = measurement.job(subject)
        opened = {subject.target.path, *(reference.path for reference in subject.references.values())}
        job = Job(
            call, arguments, subject.machine.threads, device=subject.machine.device, exclusive=measurement.exclusive, name=measurement.name,
            memory=2 * sum(size_of(path) for path in opened),  # files of 16 bits, worked with in 32
            order=order,
        )  # fmt: skip
        folder = store.root / "work" / f"measure-{digest(document)}"  # whoever holds the lock of the key is alone in it
        done = executor.run(job, folder, on_event)
        shutil.rmtree(folder, ignore_errors=True)
        metrics = dict(done.metrics)
        for metric, items in done.items.items():
            metrics |= interval_figures(metric, items, f"{digest(document)} {metric}")
        stored = {metric: asdict(items) for metric, items in done.items.items()}
        return {"metrics": metrics, "items": stored, "details": done.details, "seconds": done.seconds}, done.seconds

    return _kept(store, document, made, lambda: executor.closed, again=again)


def compare(target: Measured, base: Measured, content: str, store: Store) -> dict[str, float]:
    """The differences and ratios to the base, with intervals, of every metric that has items in both. From the store, or computed and kept.

    content  of the target: the record is kept as long as that
    """
    from compression.evaluation.bootstrap import BOOTSTRAP_VERSION, comparison_figures

    shared = sorted(target.items.keys() & base.items.keys())
    # records may be made again under their keys, so what they hold decides
    items = {metric: [asdict(target.items[metric]), asdict(base.items[metric])] for metric in shared}
    document = {
        "record": "comparison", "version": BOOTSTRAP_VERSION, "content": content, "of": target.keys, "with": base.keys, "items": digest(items),
        "metrics": shared,
    }  # fmt: skip

    def made() -> tuple[dict[str, Any], float]:
        metrics: dict[str, float] = {}
        for metric in shared:
            metrics |= comparison_figures(metric, target.items[metric], base.items[metric], f"{digest(document)} {metric}")
        return {"metrics": metrics}, 0.0

    return _kept(store, document, made)[1]["metrics"] if shared else {}


def _kept(
    store: Store, document: dict[str, Any], made: Callable[[], tuple[dict[str, Any], float]], is_cancelled: Callable[[], bool] = lambda: False,
    *, again: bool = False,
) -> tuple[str, dict[str, Any], float]:  # fmt: skip
    """The record of a key and the seconds that went into it now; where the store has none, or it is to be made `again`, what `made` makes.

    is_cancelled  asked while another process makes it; raises Cancelled when it says so
    """
    key = digest(document)
    with store.lock(key, is_cancelled):
        record = None if again else store.record(key)
        seconds = 0.0
        if record is None:
            made_now, seconds = made()
            record = {"key": document, **made_now, "measured": time.time()}
            store.put_record(key, record)
    return key, record, seconds


def known_metrics(asked: MeasurementRequest) -> Mapping[str, None]:
    """Names of all metrics that measuring may give, in order; `*` in one stands for what only the result tells."""
    names: dict[str, None] = {}
    of_the_base = MeasurementRequest(asked.planned, (), asked.data, asked.settings)
    for measurement in measurements():
        if not measurement.applies(asked):
            continue
        compared = measurement.metrics(of_the_base) if "base" in asked.roles else {}
        for metric, transform in measurement.metrics(asked).items():
            names[metric] = None
            if transform is not None:
                names |= dict.fromkeys((f"{metric}_low", f"{metric}_high"))
                if metric in compared:
                    figure = f"{metric}_{'ratio' if transform == 'exp' else 'delta'}"
                    names |= dict.fromkeys((figure, f"{figure}_low", f"{figure}_high"))
    return names
