"""Speed, load time and memory of a runtime, measured in the process that calls. Meant for a process of its own: one per measurement."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from compression.errors import EdgepressError
from compression.evaluation.contention import least_contended
from compression.evaluation.generation import generate
from compression.evaluation.runtime import Runtime


def measure_speed(open_runtime: Callable[[], Runtime], prompt: list[int], *, new_tokens: int = 64, repeats: int = 6) -> dict[str, float]:
    """Open a runtime, generate greedily with it, and close it: one warm-up, then the median of `repeats`.

    open_runtime  opens it, so that loading is timed and its memory counted; import its libraries before
    prompt        token ids; prompt and new_tokens together must fit into the runtime's context
    new_tokens    2 or more: the first one belongs to the prefill

    Returns
    tokens_per_second           of the decode: the median; _low and _high are the slowest and the fastest of the repeats. Of 6 or more, these bound
                                the true median with 95 % or more (between the extremes it lies with 1 - 2 / 2^repeats, whatever the distribution)
    prefill_tokens_per_second   the same of the prompt, and first_token_seconds what all of it took
    load_seconds
    cpu_wait_share              as `least_contended` tells it of the repeats; only where the system does
    peak_memory_mb              the highest resident memory (10^6 bytes) while it loaded and generated, above what the process held
                                before; only where the system tells it
    and nothing for a runtime that is not `timed`.
    """
    if new_tokens < 2 or repeats < 1 or not prompt:
        raise EdgepressError("speed needs a prompt, two new tokens or more and one repeat or more", key="new_tokens")
    figures: dict[str, float] = {}
    with _peak_memory(figures):
        begin = time.perf_counter()
        runtime = open_runtime()
        load_seconds = time.perf_counter() - begin
        try:
            if not runtime.timed:
                return {}
            generate(runtime, prompt, new_tokens)
            runs, waited = least_contended(lambda: [generate(runtime, prompt, new_tokens) for _ in range(repeats)])
        finally:
            runtime.close()
    figures["load_seconds"] = load_seconds
    if waited is not None:
        figures["cpu_wait_share"] = waited
    figures["first_token_seconds"] = median(run.prefill_seconds for run in runs)
    figures |= _rates("prefill_tokens_per_second", len(prompt), [run.prefill_seconds for run in runs])
    figures |= _rates("tokens_per_second", new_tokens - 1, [run.decode_seconds for run in runs])
    return figures


def _rates(name: str, tokens: int, seconds: list[float]) -> dict[str, float]:
    """The median, the lowest and the highest."""
    return {f"{name}{which}": tokens / taken for which, taken in (("", median(seconds)), ("_low", max(seconds)), ("_high", min(seconds)))}


@contextmanager
def _peak_memory(figures: dict[str, float]) -> Iterator[None]:
    """Write peak_memory_mb of what runs inside into `figures`; nothing where the kernel does not let us ask (not Linux, gVisor)."""
    gc.collect()
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists() or "VmHWM:" not in status.read_text():
        yield
        return
    reset.write_text("5")  # resets VmHWM, the peak, to what is resident now
    before = _kilobytes(status, "VmRSS")
    yield
    figures["peak_memory_mb"] = (_kilobytes(status, "VmHWM") - before) * 1024 / 1e6


def _kilobytes(status: Path, field: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(f"{field}:"))
