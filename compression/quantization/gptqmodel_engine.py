"""GPTQModel 7.6 (the successor of AutoGPTQ) as a second engine for GPTQ and AWQ: the same windows, the same layouts, another implementation."""

import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from compression.checkpoints.checkpoint import Checkpoint, open_checkpoint, weight_map
from compression.checkpoints.loading import copy_tokenizer
from compression.checkpoints.quantization_config import awq_config
from compression.checkpoints.shards import CheckpointWriter, read_tensors
from compression.checkpoints.skeleton import linear_layers, skeleton
from compression.context import Context
from compression.errors import EdgepressError, MissingExtra, UnusableData
from compression.quantization.gptqmodel_limits import EngineMethod, check_gptqmodel
from compression.quantization.settings import gptq_config, plan_schemes

SHORTEST_WINDOW = 10  # GPTQModel drops shorter calibration rows
LAST_WORDS = 2000  # characters
QUANTIZED = ("qweight", "qzeros", "scales", "g_idx")


def quantize_with_gptqmodel(
    checkpoint: Path,
    out: Path,
    windows: torch.Tensor,
    *,
    method: EngineMethod = "gptq",
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    damp_percent: float = 0.01,
    act_order: bool = True,
    context: Context,
) -> dict[str, float]:
    """Quantize every linear layer of every block of a dense checkpoint with GPTQModel; write a GPTQ or AWQ GEMM checkpoint to `out`.

    windows  calibration token ids, int64 [count, length]
    `symmetric`, `damp_percent` and `act_order` (with static groups: storage order) are GPTQ's; AWQ always has zero points.
    GPTQModel runs in a process of its own, with torch's threads of this one; GPTQ in float32 on the CPU. Embeddings, head, norms and
    tokenizer files keep the form they have in `checkpoint`.

    Returns `fallback_layers`: layers that GPTQModel rounded to nearest; `damped_layers`: those whose Hessian it could invert only with
    more than `damp_percent`.
    Raises MissingExtra without GPTQModel; Incompatible as `check_gptqmodel` does; UnusableData for windows it would drop; EdgepressError with its last words when it fails.
    """
    source = open_checkpoint(checkpoint)
    if find_spec("gptqmodel") is None:
        raise MissingExtra("gptqmodel", "gptqmodel", "engine: gptqmodel")
    check_gptqmodel(source, method=method, bits=bits, group_size=group_size)
    linear_layers(skeleton(source), source)
    if windows.dtype != torch.int64 or windows.dim() != 2 or windows.shape[1] < SHORTEST_WINDOW:
        raise UnusableData(
            f"GPTQModel needs calibration windows int64 [count, {SHORTEST_WINDOW} tokens or more], not {windows.dtype} {list(windows.shape)}"
        )
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gptqmodel-", dir=out.parent) as folder:
        settings: dict[str, Any] = {"bits": bits, "group_size": group_size, "offload_to_disk_path": f"{folder}/offload"}
        if method == "gptq":
            settings |= {"sym": symmetric, "damp_percent": damp_percent, "desc_act": act_order, "static_groups": act_order}
            planned = plan_schemes(source, bits=bits, group_size=group_size)
            config = gptq_config(planned, bits=bits, group_size=group_size, symmetric=symmetric, damp_percent=damp_percent)
        else:
            settings |= {"sym": False, "fallback": None}  # what it cannot calibrate is an error
            config = awq_config(group_size=group_size)
        job = {
            "model": str(checkpoint.resolve()), "config": f"{method.upper()}Config", "settings": settings, "windows": windows.tolist(),
            "dtype": _dtype(source, method, context.device), "device": context.device, "threads": torch.get_num_threads(), "out": f"{folder}/saved",
        }  # fmt: skip
        log = _run(job, Path(folder) / "printed", source.num_layers, context)
        _rewrite(source, Path(folder) / "saved", out, config)
    return told(log, damp_percent, context)


def told(log: list[dict[str, Any]], damp_percent: float, context: Context) -> dict[str, float]:
    """What GPTQModel did otherwise than asked, from its log: counted, and said as warnings."""
    layers = {f"block {entry['layer']} {entry['module']}": entry for entry in log}
    rounded = [layer for layer, entry in layers.items() if "fallback" in entry["loss"]]
    # Its log has five decimals. AWQ damps nothing.
    damped = [layer for layer, entry in layers.items() if entry["damp"] and float(entry["damp"]) > damp_percent + 1e-5]
    if rounded:
        context.warn(f"GPTQModel rounded to nearest: {', '.join(rounded)}")
    if damped:
        context.warn(f"GPTQModel raised damp_percent from {damp_percent} to invert the Hessian of {', '.join(damped)}")
    return {"fallback_layers": float(len(rounded)), "damped_layers": float(len(damped))}


def _dtype(source: Checkpoint, method: EngineMethod, device: str) -> str:
    """The checkpoint's, but float32 for GPTQ on the CPU, and half precision for AWQ, which takes no other."""
    if method == "awq":
        return "float16" if source.dtype == "float32" else source.dtype
    return "float32" if torch.device(device).type == "cpu" else source.dtype


def _run(job: dict[str, Any], printed: Path, blocks: int, context: Context) -> list[dict[str, Any]]:
    """GPTQModel's log, an entry a layer. What it prints goes to the file `printed`, the logs it leaves where it runs beside it."""
    child = Path(__file__).with_name("gptqmodel_child.py")
    reading, writing = os.pipe()
    answer: dict[str, Any] = {}
    with os.fdopen(reading) as answers, printed.open("wb") as output, subprocess.Popen(
        [sys.executable, "-P", str(child), str(writing)],
        stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, text=True, pass_fds=(writing,), cwd=printed.parent,
    ) as process:  # fmt: skip
        os.close(writing)
        try:
            assert process.stdin is not None
            with process.stdin:
                process.stdin.write(json.dumps(job))
            for answer in map(json.loads, answers):
                if "done" in answer:
                    context.progress(answer["done"], blocks, f"block {answer['done']} of {blocks}")
        except BaseException:
            process.kill()
            raise
    if process.returncode or "log" not in answer:
        raise EdgepressError(
            f"GPTQModel failed (exit code {process.returncode}): {printed.read_text(errors='replace').strip()[-LAST_WORDS:]}"
        )
    return answer["log"]


def _rewrite(source: Checkpoint, saved: Path, out: Path, config: dict[str, Any]) -> None:
    """GPTQModel's checkpoint as one of ours: what is not quantized in the dtype it had, our config, the same tokenizer, nothing else.

    Raises EdgepressError where GPTQModel quantized other layers than asked.
    """
    names = list(weight_map(saved))
    quantized = {name.removesuffix(".qweight") for name in names if name.endswith(".qweight")}
    parts = {name for name in names if name.rpartition(".")[2] in QUANTIZED}
    if other := quantized ^ {name.removesuffix(".weight") for name in source.linear_tensors()}:
        raise EdgepressError(
            f"GPTQModel quantized other layers than the linear layers of the blocks; these differ: {', '.join(sorted(other))}"
        )
    writer = CheckpointWriter(out)
    for name in names:
        (tensor,) = read_tensors(saved, [name]).values()
        if name in parts:
            writer.add({name: tensor})
        elif name in source.tensors:
            writer.add({name: tensor.to(read_tensors(source.path, [name])[name].dtype)})
    copy_tokenizer(source.path, out)
    others = set(source.tensors) - {f"{module}.weight" for module in quantized}
    writer.add(read_tensors(source.path, sorted(others - set(names))))  # what GPTQModel does not write it has not changed
    writer.finish(source.config | {"quantization_config": config}, names=others | parts)
