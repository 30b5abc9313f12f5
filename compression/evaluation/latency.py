"""How long each token takes: the middle and the tail, which an average hides. Measured in the process that calls, meant to be alone on the machine."""

import time

import numpy as np

from compression.errors import EdgepressError
from compression.evaluation.contention import least_contended
from compression.evaluation.generation import stream
from compression.evaluation.runtime import Runtime

NAMES = ("first_token_seconds_p50", "first_token_seconds_p95", "token_seconds_p50", "token_seconds_p95")
WAITED = "latency_cpu_wait_share"


def measure_latency(runtime: Runtime, prompt: list[int], *, new_tokens: int = 32, repeats: int = 10) -> dict[str, float]:
    """Generate greedily `repeats` times after a warm-up, and time every token.

    prompt      token ids; what does not fit into the runtime's context with new_tokens loses its beginning
    new_tokens  2 or more: the first one belongs to the prefill

    Returns first_token_seconds_p50 and _p95 over the repeats, and token_seconds_p50 and _p95 over all further tokens of all of them,
    and latency_cpu_wait_share as `least_contended` tells it, where the system does; nothing for a runtime that is not `timed`.
    """
    if new_tokens < 2 or repeats < 1 or not prompt:
        raise EdgepressError("latency needs a prompt, two new tokens or more and one repeat or more", key="new_tokens")
    if not runtime.timed:
        return {}
    prompt = prompt[-(runtime.max_length - new_tokens) :]
    _token_seconds(runtime, prompt, new_tokens)
    runs, waited = least_contended(lambda: [_token_seconds(runtime, prompt, new_tokens) for _ in range(repeats)])
    first, further = [run[0] for run in runs], [seconds for run in runs for seconds in run[1:]]
    figures = dict(zip(NAMES, map(float, (*np.percentile(first, (50, 95)), *np.percentile(further, (50, 95)))), strict=True))
    return figures if waited is None else figures | {WAITED: waited}


def _token_seconds(runtime: Runtime, prompt: list[int], new_tokens: int) -> list[float]:
    tokens = stream(runtime, prompt, new_tokens)
    seconds = []
    for _ in range(new_tokens):
        begin = time.perf_counter()
        next(tokens)
        seconds.append(time.perf_counter() - begin)
    return seconds
