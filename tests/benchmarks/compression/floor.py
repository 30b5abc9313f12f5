"""What no method on the walk can do without: two forward passes of the calibration windows, and the Hessian of every shared input.

Forward passes are of the transformers model without its head, in float32, in batches as large as the walk's; Hessian products are
counted (2 · tokens · width² operations for an input) and taken at the rate of a large float32 product, measured here too.
"""

import json
import time
from pathlib import Path

import torch
from child import read_job, read_windows
from torch import nn

from compression.calibration.walk import TOKENS_PER_BATCH
from compression.checkpoints.loading import load_model

SIDE, SECONDS = 2048, 2.0  # of the product, and for how long it is measured


@torch.inference_mode()
def main() -> None:
    job = read_job()
    torch.set_num_threads(job["threads"])
    windows = torch.tensor(read_windows(job))
    model = load_model(Path(job["checkpoint"])).base_model
    batches = windows.split(max(1, TOKENS_PER_BATCH // windows.shape[1]))
    widths = shared_inputs(model, batches[0])
    started = time.perf_counter()
    for _ in range(2):
        for ids in batches:
            model(input_ids=ids, use_cache=False)
    forward = time.perf_counter() - started
    rate = matrix_rate()
    hessians = sum(2 * windows.numel() * width**2 for width in widths) / rate
    answer = {"seconds": forward + hessians, "forward_seconds": forward, "hessian_seconds": hessians, "gflops": rate / 1e9}
    Path(job["answer"]).write_text(json.dumps(answer))


def shared_inputs(model: nn.Module, ids: torch.Tensor) -> list[int]:
    """Widths of the different tensors that linear layers read."""
    seen: dict[int, torch.Tensor] = {}

    def note(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen[id(inputs[0])] = inputs[0]  # kept, so that no other gets its id

    handles = [module.register_forward_pre_hook(note) for module in model.modules() if isinstance(module, nn.Linear)]
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return [x.shape[-1] for x in seen.values()]


def matrix_rate() -> float:
    """Operations a second of a float32 product, the best of those that fit into `SECONDS`."""
    x = torch.randn(SIDE, SIDE)
    best, ends = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < ends:
        started = time.perf_counter()
        x @ x
        best = min(best, time.perf_counter() - started)
    return 2 * SIDE**3 / best


if __name__ == "__main__":
    main()
