"""Records: what was measured about a checkpoint or artifact, when, and under which key. Imports no torch.

Quality depends on the bytes, the data, the scorer and the runtime's version. Speed and memory depend on the machine and the number of
threads too, and are taken alone on the machine.
"""

import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil

from compression.data import DataSpec, fingerprint
from compression.evaluation import QUALITY_VERSION, SPEED_VERSION
from export.runtimes import installed_runtimes, runtime_name
from tasks.children import Children, EventSink, Job
from tasks.identity import Machine, digest
from tasks.store import Store


@dataclass(frozen=True)
class Reference:
    """A checkpoint that others are compared with."""

    path: Path
    content: str


@lru_cache(maxsize=1)
def machine_fingerprint() -> dict[str, Any]:
    """What speed depends on: the processor, its cores, the memory, the host's name."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = next((line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")), model)
    return {
        "host": platform.node(), "processor": model, "cores": os.cpu_count(), "memory_gib": round(psutil.virtual_memory().total / 2**30),
    }  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """Metrics of a target, and the seconds that children worked for them now: 0 when every record was there already."""

    metrics: dict[str, float]
    seconds: float


def measure(
    target: Reference, references: Mapping[str, Reference], tokenizer: Path, data: DataSpec, machine: Machine,
    store: Store, children: Children, folder: Path, sink: EventSink,
) -> Measured:  # fmt: skip
    """Take the quality and the speed record of `target` from the store, or measure and keep them."""
    name = runtime_name(target.path)
    common = {
        "content": target.content, "data": fingerprint(data, "evaluation"), "runtime": name,
        "runtime_version": installed_runtimes()[name], "device": machine.device,
    }  # fmt: skip
    quality = {
        "record": "quality",
        "version": QUALITY_VERSION,
        **common,
        "references": {role: r.content for role, r in references.items()},
        "threads": machine.threads,
    }
    speed = {"record": "speed", "version": SPEED_VERSION, **common, "machine": machine_fingerprint(), "threads": machine.threads}
    job = {"target": str(target.path), "tokenizer": str(tokenizer), "data": data.model_dump(mode="json")}
    jobs = [
        (quality, Job("tasks.jobs:measure_quality", {**job, "references": {role: str(r.path) for role, r in references.items()}}, machine.threads, device=machine.device)),
        (speed, Job("tasks.jobs:measure_speed", job, machine.threads, device=machine.device, alone=True)),
    ]  # fmt: skip
    metrics: dict[str, float] = {}
    seconds = 0.0
    for document, work in jobs:
        key = digest(document)
        with store.lock(key):
            record = store.record(key)
            if record is None:
                done = children.run(work, folder / work.call.partition(":")[2], sink)
                seconds += done.seconds
                record = {"key": document, "metrics": done.metrics, "seconds": done.seconds, "measured": time.time()}
                store.put_record(key, record)
        metrics |= record["metrics"]
    return Measured(metrics, seconds)
