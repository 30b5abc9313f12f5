"""The one walk over a checkpoint that every calibrated method rides on: block by block, from safetensors to safetensors.

A block is loaded; the calibration windows run through it behind the already compressed blocks; the method that asked
gets the second moments of its linear layers' inputs and changes its weights; the windows run through the changed
block; it is written and dropped. Memory: a block, the second moments of its inputs, the hidden states of the windows.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from compression.checkpoint import Checkpoint, open_checkpoint
from compression.context import Context
from compression.errors import Incompatible, UnusableData
from compression.loading import copy_tokenizer
from compression.shards import CheckpointWriter, read_tensors

TOKENS_PER_BATCH = 4096


@dataclass
class SharedInput:
    """Linear layers of a block that read the same tensor (q, k and v; gate and up), and the second moment of that input.

    layers  module paths in the block
    gram    [in, in], the mean of x xᵀ over all calibration tokens, float32
    tokens  how many tokens that is
    """

    layers: tuple[str, ...]
    gram: torch.Tensor
    tokens: int = 0

    def add(self, x: torch.Tensor) -> None:
        """Count in inputs [..., in]."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        total = self.tokens + len(x)
        self.gram.addmm_(x.T, x, beta=self.tokens / total, alpha=1 / total)
        self.tokens = total


@dataclass
class Block:
    """A decoder block on the device, with its weights, and what its linear layers read.

    name    its path in the model, "model.layers.3"
    module  transformers' own decoder layer; a method changes its weights in place
    inputs  the second moments of its linear layers' inputs, in the order in which they are read
    dtypes  of the parameters in the checkpoint, by path in the block
    """

    index: int
    name: str
    module: nn.Module
    dtypes: dict[str, torch.dtype]
    inputs: list[SharedInput] = field(default_factory=list)

    def linear(self, path: str) -> nn.Linear:
        """A linear layer by its path in the block."""
        module = self.module.get_submodule(path)
        assert isinstance(module, nn.Linear)
        return module


@dataclass(frozen=True)
class _Batch:
    """Hidden states [windows, length, hidden] on their way through the model, and what transformers passes to each block beside them."""

    hidden: torch.Tensor
    arguments: list[dict[str, Any]]  # by block; shared by all batches of one shape


Compress = Callable[[Block], Mapping[str, torch.Tensor]]


def compress_blocks(
    checkpoint: Path, out: Path, windows: torch.Tensor, compress: Compress, *, config: Mapping[str, Any], context: Context
) -> None:
    """Walk over a dense checkpoint and write what `compress` makes of it to the new directory `out`.

    windows   token ids, int64 [count, length]
    compress  changes a block's weights in place and returns the tensors, by path in the block, that stand in the new
              checkpoint for the parameters of the same module ("mlp.up_proj.qweight" for "mlp.up_proj.weight");
              all other parameters are written from the module in their dtype in the checkpoint, and everything outside the blocks as it was
    config    entries added to config.json
    """
    source = open_checkpoint(checkpoint)
    writer = CheckpointWriter(out)
    written: set[str] = set()
    for block in walk(source, windows, context=context):
        replaced = compress(block)
        kept = _keep_dtypes(block, {name.rpartition(".")[0] + ".weight" for name in replaced})
        writer.add({f"{block.name}.{name}": tensor for name, tensor in (kept | dict(replaced)).items()})
        written |= {f"{block.name}.{name}" for name in block.dtypes}
    writer.add(read_tensors(checkpoint, [name for name in source.tensors if name not in written]))
    copy_tokenizer(checkpoint, out)
    writer.finish(source.config | dict(config))


def _keep_dtypes(block: Block, replaced: set[str]) -> dict[str, torch.Tensor]:
    """The parameters that stay, in the checkpoint's dtype; the module is rounded to it too, so that what follows sees what is stored."""
    kept = {}
    with torch.no_grad():
        for name, parameter in block.module.named_parameters():
            if name not in replaced:
                kept[name] = parameter.to(block.dtypes[name])
                parameter.copy_(kept[name])
    return kept


@torch.no_grad()
def walk(checkpoint: Checkpoint, windows: torch.Tensor, *, context: Context) -> Iterator[Block]:
    """Yield each decoder block of a dense checkpoint with the second moments of its inputs over `windows`.

    The consumer may change the block's weights before it asks for the next one: the windows then run through the changed block.
    Weights and activations are float32 on the CPU and the checkpoint's dtype elsewhere.

    Raises Incompatible for a quantized checkpoint, UnusableData for windows that are not int64 [count, length] within the model's length.
    """
    _check(checkpoint, windows)
    model = _skeleton(checkpoint, context.device)
    batches = _enter(model, checkpoint, windows, context.device)
    layers = model.get_submodule(checkpoint.family.blocks)
    assert isinstance(layers, nn.ModuleList)
    total = len(layers)
    for index in range(total):
        context.progress(index, total, f"block {index + 1} of {total}")
        name = f"{checkpoint.family.blocks}.{index}"
        block = Block(index, name, layers[index], _load(layers[index], checkpoint, name, model, context.device))
        _gather(block, batches)
        yield block
        for batch in batches:
            batch.hidden.copy_(block.module(batch.hidden, **batch.arguments[index]))
        block.inputs.clear()
        block.module.to("meta")
    context.progress(total, total, "calibrated")


def _check(checkpoint: Checkpoint, windows: torch.Tensor) -> None:
    if checkpoint.layout != "dense":
        raise Incompatible(f"{checkpoint.path} is quantized already ({checkpoint.layout}); calibration needs a dense checkpoint")
    if windows.dtype != torch.int64 or windows.dim() != 2 or not windows.numel():
        raise UnusableData(f"calibration windows must be int64 [count, length], not {windows.dtype} {list(windows.shape)}")
    if windows.shape[1] > checkpoint.max_length:
        raise UnusableData(f"calibration windows of {windows.shape[1]} tokens are longer than the model takes ({checkpoint.max_length})")
    if int(windows.min()) < 0 or int(windows.max()) >= checkpoint.vocab_size:
        raise UnusableData(f"calibration windows hold token ids outside the model's vocabulary of {checkpoint.vocab_size}")


def _skeleton(checkpoint: Checkpoint, device: str) -> PreTrainedModel:
    """The model without weights."""
    config = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True, trust_remote_code=False)
    dtype = torch.float32 if torch.device(device).type == "cpu" else getattr(torch, checkpoint.dtype)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


def _load(module: nn.Module, checkpoint: Checkpoint, name: str, model: PreTrainedModel, device: str) -> dict[str, torch.dtype]:
    """Fill a module of the skeleton from the checkpoint; returns the dtypes its parameters have there."""
    dtype = next(module.parameters()).dtype
    paths = list(module.state_dict())
    tensors = read_tensors(checkpoint.path, [f"{name}.{path}" for path in paths])
    dtypes = {path: tensors[f"{name}.{path}"].dtype for path in paths}
    module.load_state_dict({path: tensors[f"{name}.{path}"].to(device, dtype, copy=True) for path in paths}, assign=True)
    _fill_buffers(module, model, device)
    return dtypes


def _fill_buffers(module: nn.Module, model: PreTrainedModel, device: str) -> None:
    """Compute buffers that no checkpoint holds (rotary frequencies) the way transformers does after loading."""
    for part in module.modules():
        if any(buffer.is_meta for buffer in part.buffers(recurse=False)):
            part.to_empty(device=device, recurse=False)
            model._init_weights(part)


def _enter(model: PreTrainedModel, checkpoint: Checkpoint, windows: torch.Tensor, device: str) -> list[_Batch]:
    """Run the windows through what stands before the blocks, and record what transformers passes to every block.

    Windows of one length without padding: masks and positions depend on a batch's shape only.
    """
    family = checkpoint.family
    _load(model.get_submodule(family.embed), checkpoint, family.embed, model, device)
    base = model.base_model
    layers = model.get_submodule(family.blocks)
    for part in base.children():
        if part is not layers:
            _fill_buffers(part, model, device)
    norm = model.get_submodule(family.norm)
    seen: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def record(hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        seen.append((hidden_states, arguments))
        return hidden_states

    passed = [*layers.children(), norm]
    for part in passed:
        part.forward = record if part is not norm else _identity
    by_size: dict[int, list[dict[str, Any]]] = {}
    batches = []
    for ids in windows.split(max(1, TOKENS_PER_BATCH // windows.shape[1])):
        seen.clear()
        base(input_ids=ids.to(device), use_cache=False)
        arguments = by_size.setdefault(len(ids), [arguments for _, arguments in seen])
        batches.append(_Batch(seen[0][0].clone(), arguments))
    for part in passed:
        del part.forward
    model.get_submodule(family.embed).to("meta")
    return batches


def _identity(hidden_states: torch.Tensor) -> torch.Tensor:
    return hidden_states


def _gather(block: Block, batches: list[_Batch]) -> None:
    """Run the batches through the block and add up the second moments of its linear layers' inputs."""
    by_layer: dict[str, SharedInput] = {}
    last: list[tuple[torch.Tensor, SharedInput]] = []

    def hook(path: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def before(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            (x,) = arguments
            if last and last[0][0] is x:  # the very tensor that the layer before read
                if path not in by_layer:
                    shared = last[0][1]
                    shared.layers = (*shared.layers, path)
                    by_layer[path] = shared
                return
            if path not in by_layer:
                by_layer[path] = SharedInput((path,), torch.zeros(x.shape[-1], x.shape[-1], device=x.device))
                block.inputs.append(by_layer[path])
            by_layer[path].add(x)
            last[:] = [(x, by_layer[path])]

        return before

    linears = [(path, module) for path, module in block.module.named_modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_pre_hook(hook(path)) for path, module in linears]
    for batch in batches:
        block.module(batch.hidden, **batch.arguments[block.index])
        last.clear()
    for handle in handles:
        handle.remove()
