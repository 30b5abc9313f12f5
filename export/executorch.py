"""A checkpoint as one ExecuTorch program for the XNNPACK backend, which keeps its KV cache itself.

Inputs   `input_ids` int64 [1, length], `cache_position` int64 [length]: the places in the cache that the tokens take, one after another
Output   `logits` float32 [1, length, vocabulary]
State    keys and values of `max_length` tokens in every layer, float32. A call that starts at place 0 forgets what was before
Limits   `get_max_context_len`, the tokens that fit in all, and `get_max_seq_len`, those that one call reads at most: methods of the program

The names are those that ExecuTorch's own runner for language models (extension/llm/runner, C++) reads.
"""

import time
from pathlib import Path

import torch
from torch.export import Dim, ExportedProgram
from transformers import PreTrainedModel
from transformers.integrations.executorch import TorchExportableModuleWithStaticCache

from compression.checkpoints.checkpoint import open_checkpoint
from compression.checkpoints.loading import load_model
from compression.context import Context
from export.atomic_directory import whole
from export.edge_checks import cache_length, check_executorch
from export.quiet import quiet_and_offline
from export.traced import describe

with quiet_and_offline():  # it imports torchao, which lists the libraries that it does not find
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import ExecutorchProgramManager, to_edge_transform_and_lower


def export_executorch(
    checkpoint: Path, out: Path, *, dtype: str = "float32", max_length: int | None = None, chunk: int = 128, context: Context
) -> dict[str, float]:
    """Write `model.pte`, `config.json` and the tokenizer into `out`; return bytes and the seconds it took.

    dtype       of weights, activations and cache: float32
    max_length  tokens that fit, prompt and generation together; None: the model's context, 2048 at most. config.json gives it as
                `max_position_embeddings`
    chunk       tokens that one call reads at most (fewer than max_length): longer prompts take several, and memory for activations is
                planned for so many
    Layouts that are not dense are dequantized first.
    Raises Incompatible for what `check_executorch` refuses, UnusableModel for a directory that cannot be opened.
    """
    started = time.perf_counter()
    source = open_checkpoint(checkpoint)
    check_executorch(source, dtype=dtype, max_length=max_length, chunk=chunk)
    length = cache_length(source, max_length)
    if source.layout != "dense":
        context.warn(f"export.executorch dequantizes the {source.layout.upper()} checkpoint and writes {dtype} weights")
    with whole(out) as place:
        with quiet_and_offline():
            model = load_model(checkpoint, dtype=torch.float32)
            program = trace_generation(model, length, min(chunk, length - 1))
            context.progress(1, 2, "traced")
            write_program(lower(program, length, min(chunk, length - 1)), place / "model.pte")
        context.progress(2, 2, "written")
        describe(source, place, max_position_embeddings=length)
    return {"bytes": sum(f.stat().st_size for f in out.rglob("*") if f.is_file()), "seconds": time.perf_counter() - started}


def trace_generation(model: PreTrainedModel, length: int, chunk: int) -> ExportedProgram:
    """Trace a causal model with a cache of `length` tokens that reads 1 to `chunk` tokens at a time, with the interface above.

    Layers with a sliding window keep all tokens too, and mask what is outside. The trace is Dynamo's (strict): the other one leaves
    functions in the graph that ExecuTorch cannot lower.
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
    """What XNNPACK can compute becomes its own, the rest stays with ExecuTorch's portable operators."""
    limits = {"get_max_context_len": length, "get_max_seq_len": chunk, "use_kv_cache": True, "enable_dynamic_shape": True}
    return to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()], constant_methods=limits).to_executorch()


def write_program(program: ExecutorchProgramManager, file: Path) -> None:
    with file.open("wb") as stream:
        program.write_to_file(stream)
