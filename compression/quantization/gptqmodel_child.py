"""GPTQModel in a process of its own: `python -P gptqmodel_child.py DESCRIPTOR`. compression/quantization/gptqmodel_engine.py calls it, and the benchmark.

GPTQModel ends the process it runs in when one of its threads fails, patches transformers, draws from the global random
generators and reads its number of threads from the environment. Imports nothing of edgepress.

Takes a job as JSON on the standard input. Answers on the file descriptor, since GPTQModel prints on the standard output, with a line of
JSON for each block done ({"done": 1}) and a last one with GPTQModel's log ({"log": [...]}).
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

# The thread pool is made at the first use, and fails with a single worker, GPTQModel's own choice on 2 cores.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, min(12, ((os.cpu_count() or 1) + 1) // 2))))

import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.quantization import config as configs

WINDOWS_PER_BATCH = 16


def load(model: str, *, config: str, settings: dict[str, Any], dtype: str, device: str) -> Any:
    """A dense checkpoint, ready to be quantized as the GPTQModel class `config` ("GPTQConfig") says with `settings`."""
    quantize_config = getattr(configs, config)(**settings)
    return GPTQModel.load(model, quantize_config, device=device, dtype=getattr(torch, dtype), trust_remote_code=False)


def quantize(model: Any, windows: list[list[int]], block_done: Callable[[int], None]) -> list[dict[str, Any]]:
    """Quantize what `load` returned; GPTQModel's log, an entry a layer. Without windows for the methods that need none."""

    def layer_complete(layer_idx: int, submodule_finalized: bool) -> None:
        if submodule_finalized:
            block_done(layer_idx + 1)

    model.layer_callback = layer_complete
    rows = [{"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)} for ids in windows]
    is_awq = isinstance(model.quantize_config, configs.AWQConfig)
    backend = BACKEND.AWQ_TORCH if is_awq else BACKEND.AUTO  # AWQ without a GPU starts only with this one
    log = model.quantize(rows or None, batch_size=WINDOWS_PER_BATCH, backend=backend)
    return [entry for entries in log.values() for entry in entries]


def main() -> None:
    answers = os.fdopen(int(sys.argv[1]), "w")

    def answer(**content: Any) -> None:
        print(json.dumps(content), file=answers, flush=True)

    job = json.load(sys.stdin)
    torch.set_num_threads(job.pop("threads"))
    torch.manual_seed(0)
    windows, out = job.pop("windows"), job.pop("out")
    model = load(**job)
    log = quantize(model, windows, lambda done: answer(done=done))
    model.save(out)
    answer(log=[{key: entry.get(key) for key in ("layer", "module", "loss", "damp")} for entry in log])


if __name__ == "__main__":
    main()
