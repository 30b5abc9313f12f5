"""Write a checkpoint as the directory of an ExecuTorch artifact."""

import time
from pathlib import Path

import torch
from torch.export import Dim, ExportedProgram
from transformers import PreTrainedModel
from transformers.integrations.executorch import TorchExportableModuleWithStaticCache

from compression.checkpoints.checkpoint import open_checkpoint
from compression.checkpoints.loading import load_model
from compression.context import Context
from export.atomic_directory import atomic_directory, export_figures
from export.executorch.check import ExecutorchSettings, check_executorch
from export.quiet import quiet_and_offline
from export.traced import copy_description

with quiet_and_offline():  # importing torchao lists the libraries that it does not find
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import ExecutorchProgramManager, to_edge_transform_and_lower


def export_executorch(checkpoint: Path, out: Path, settings: ExecutorchSettings, *, context: Context) -> dict[str, float]:
    """Write a checkpoint as one program for ExecuTorch's XNNPACK backend.

    Example:
        settings = ExecutorchSettings(max_length=512)
        export_executorch(Path("model"), Path("model-executorch"), settings, context=Context())

    Args:
        checkpoint: A dense checkpoint, or a quantized one, which is dequantized.
        out: Directory for `model.pte`, `config.json` and the tokenizer; after a failure nothing is written. `config.json` gives the
            cache's length as `max_position_embeddings`.
        settings: Length of the cache, and tokens that one call reads (fewer than the cache holds): longer prompts take several calls.
        context: Receives progress and warnings.

    Returns:
        `bytes` of all files in `out`, and `seconds`.

    Raises:
        Incompatible: `check_executorch` refuses the checkpoint.
        UnusableModel: The checkpoint cannot be opened.
    """
    started = time.perf_counter()
    source = open_checkpoint(checkpoint)
    check_executorch(source, settings)
    length = settings.cache_length(source)
    chunk = min(settings.chunk, length - 1)
    if source.layout != "dense":
        context.warn(f"export.executorch dequantizes the {source.layout.upper()} checkpoint and writes {settings.dtype} weights")
    with atomic_directory(out) as temporary:
        with quiet_and_offline():
            model = load_model(checkpoint, dtype=torch.float32)
            program = trace_generation(model, length, chunk)
            context.progress(1, 2, "traced")
            write_program(lower(program, length, chunk), temporary / "model.pte")
        context.progress(2, 2, "written")
        copy_description(source, temporary, max_position_embeddings=length)
    return export_figures(out, started)


def trace_generation(model: PreTrainedModel, length: int, chunk: int) -> ExportedProgram:
    """Trace a causal model with a cache of `length` tokens that reads 1 to `chunk` tokens at a time, with this package's interface.

    Layers with a sliding window keep all tokens too, and mask those outside the window. Dynamo traces (strict=True): the other tracer
    leaves functions in the graph that ExecuTorch cannot lower.
    """
    model.requires_grad_(False)
    model.config.use_cache = model.generation_config.use_cache = True
    model.generation_config.cache_implementation = "static"
    module = TorchExportableModuleWithStaticCache(model, batch_size=1, max_cache_len=length).eval()
    tokens = Dim("length", min=1, max=chunk)
    axes = {"input_ids": {1: tokens}, "cache_position": {0: tokens}}
    sample = {"input_ids": torch.arange(5)[None], "cache_position": torch.arange(5)}
    with torch.no_grad():
        return torch.export.export(module, (), sample, dynamic_shapes=axes, strict=True)


def lower(program: ExportedProgram, length: int, chunk: int) -> ExecutorchProgramManager:
    """Hand to XNNPACK what it can compute; the rest runs in ExecuTorch's portable operators."""
    limits = {"get_max_context_len": length, "get_max_seq_len": chunk, "use_kv_cache": True, "enable_dynamic_shape": True}
    return to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()], constant_methods=limits).to_executorch()


def write_program(program: ExecutorchProgramManager, file: Path) -> None:
    with file.open("wb") as stream:
        program.write_to_file(stream)
