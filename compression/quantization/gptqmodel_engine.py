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
from compression.quantization.gptqmodel_limits import EngineMethod, check_gptqmodel, engine_method
from compression.quantization.settings import AWQSettings, GPTQSettings, gptq_config, planned_schemes

SHORTEST_WINDOW = 10  # GPTQModel drops shorter calibration rows
LAST_WORDS = 2000  # characters
QUANTIZED = ("qweight", "qzeros", "scales", "g_idx")


def quantize_with_gptqmodel(
    checkpoint: Path, out: Path, settings: GPTQSettings | AWQSettings, windows: torch.Tensor, *, context: Context
) -> dict[str, float]:
    """Quantize every linear layer of every block of a dense checkpoint with GPTQModel; write a GPTQ or AWQ GEMM checkpoint to `out`.

    GPTQModel runs in a process of its own, with torch's threads of this one; GPTQ in float32 on the CPU. Embeddings, head, norms and
    tokenizer files keep the form they have in `checkpoint`. GPTQModel clips as it does by itself: `mse` and `clip` have no effect here.

    Args:
        checkpoint: A dense checkpoint directory.
        out: A new directory.
        settings: Those of GPTQ or those of AWQ, which choose the method.
        windows: Calibration token ids, int64 [count, length].
        context: Device and callbacks.

    Returns:
        `fallback_layers`: layers that GPTQModel rounded to nearest; `damped_layers`: those whose Hessian it could invert only with more
        than `damp_percent`.

    Raises:
        MissingExtra: GPTQModel is not installed.
        Incompatible: As `check_gptqmodel` does.
        UnusableData: GPTQModel would drop the windows.
        EdgepressError: GPTQModel fails; the message ends with what it printed last.
    """
    source = open_checkpoint(checkpoint)
    if find_spec("gptqmodel") is None:
        raise MissingExtra("gptqmodel", "gptqmodel", "engine: gptqmodel")
    check_gptqmodel(source, settings)
    linear_layers(skeleton(source), source)
    if windows.dtype != torch.int64 or windows.dim() != 2 or windows.shape[1] < SHORTEST_WINDOW:
        raise UnusableData(
            f"GPTQModel needs calibration windows int64 [count, {SHORTEST_WINDOW} tokens or more], not {windows.dtype} {list(windows.shape)}"
        )
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gptqmodel-", dir=out.parent) as folder:
        options: dict[str, Any] = {"bits": settings.bits, "group_size": settings.group_size, "offload_to_disk_path": f"{folder}/offload"}
        if isinstance(settings, GPTQSettings):
            options |= {"sym": settings.symmetric, "damp_percent": settings.damp_percent}
            options |= {"desc_act": settings.act_order, "static_groups": settings.act_order}
            config = gptq_config(planned_schemes(source, settings), settings, damp_percent=settings.damp_percent)
        else:
            options |= {"sym": False, "fallback": None}  # what it cannot calibrate is an error
            config = awq_config(group_size=settings.group_size)
        method = engine_method(settings)
        job = {
            "model": str(checkpoint.resolve()), "config": f"{method.upper()}Config", "settings": options, "windows": windows.tolist(),
            "dtype": _dtype(source, method, context.device), "device": context.device, "threads": torch.get_num_threads(), "out": f"{folder}/saved",
        }  # fmt: skip
        log = _run(job, Path(folder) / "printed", source.num_layers, context)
        _rewrite(source, Path(folder) / "saved", out, config)
    return summarize_log(log, settings.damp_percent if isinstance(settings, GPTQSettings) else None, context)


def summarize_log(log: list[dict[str, Any]], damp_percent: float | None, context: Context) -> dict[str, float]:
    """Count the layers that GPTQModel's log says it treated otherwise than requested, and warn of them.

    Args:
        log: An entry a layer, with keys "layer", "module", "loss" and "damp".
        damp_percent: What was requested; None for AWQ, which damps nothing.
        context: Receives the warnings.

    Returns:
        `fallback_layers` and `damped_layers`.
    """
    layers = {f"block {entry['layer']} {entry['module']}": entry for entry in log}
    rounded = [layer for layer, entry in layers.items() if "fallback" in entry["loss"]]
    damped = []
    if damp_percent is not None:  # the log has five decimals
        damped = [layer for layer, entry in layers.items() if entry["damp"] and float(entry["damp"]) > damp_percent + 1e-5]
    if rounded:
        context.warn(f"GPTQModel rounded to nearest: {', '.join(rounded)}")
    if damped:
        context.warn(f"GPTQModel raised damp_percent from {damp_percent} to invert the Hessian of {', '.join(damped)}")
    return {"fallback_layers": float(len(rounded)), "damped_layers": float(len(damped))}


def _dtype(source: Checkpoint, method: EngineMethod, device: str) -> str:
    """Return the dtype that GPTQModel computes in: the checkpoint's, but float32 for GPTQ on the CPU, and half precision for AWQ."""
    if method == "awq":
        return "float16" if source.dtype == "float32" else source.dtype
    return "float32" if torch.device(device).type == "cpu" else source.dtype


def _run(job: dict[str, Any], printed: Path, blocks: int, context: Context) -> list[dict[str, Any]]:
    """Return GPTQModel's log, an entry a layer. Its output goes to the file `printed`, and the logs that it leaves in its directory stay next to it."""
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
    """Write GPTQModel's checkpoint as one of ours: what is not quantized in its former dtype, our config, the same tokenizer, nothing else.

    Raises EdgepressError where GPTQModel quantized other layers than requested.
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
