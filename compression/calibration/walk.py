"""Walk over a checkpoint block by block, from safetensors to safetensors, as every calibrated method does.

A block is loaded; the calibration windows run through it after the already compressed blocks; the method
gets the statistics of its linear layers' inputs and changes its weights; the windows run through the changed
block; it is dropped. Memory: a block, the statistics of its inputs, the hidden states of the windows (compression/calibration/hidden_states.py).
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from compression.calibration.hidden_states import HiddenStates
from compression.checkpoints.checkpoint import Checkpoint
from compression.checkpoints.masks import read_masks
from compression.checkpoints.shards import read_tensors
from compression.checkpoints.skeleton import linear_layers, skeleton
from compression.context import Context
from compression.errors import Incompatible, UnusableData, UnusableModel

TOKENS_PER_BATCH = 4096

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # of a block, apart from the hidden states
Statistic = Literal["hessian", "mean_square", "absmax"]
Collect = frozenset[Statistic]
HESSIAN: Collect = frozenset({"hessian"})


@dataclass
class SharedInput:
    """Linear layers of a block that read the same tensor (q, k and v; gate and up), and the collected statistics of that input [tokens, in].

    layers       module paths in the block
    tokens       how many tokens were seen
    hessian      [in, in], the mean of x xᵀ over all tokens, float32: half the Hessian of the squared error of the layers' outputs
    mean_square  [in], the mean of x² (the diagonal of `hessian` where that is collected)
    absmax       [in], the largest |x|
    """

    layers: tuple[str, ...]
    tokens: int = 0
    hessian: torch.Tensor | None = None
    mean_square: torch.Tensor | None = None
    absmax: torch.Tensor | None = None

    @property
    def second_moment(self) -> torch.Tensor:
        """`hessian`, of a walk that collects it."""
        assert self.hessian is not None, "this walk collects no hessian"
        return self.hessian

    def add(self, x: torch.Tensor, collect: Collect) -> None:
        """Update the statistics with inputs [..., in]."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        width, before = x.shape[-1], self.tokens
        self.tokens += len(x)
        if "hessian" in collect:
            if self.hessian is None:
                self.hessian = torch.zeros(width, width, device=x.device)
            self.hessian.addmm_(x.T, x, beta=before / self.tokens, alpha=1 / self.tokens)
            self.mean_square = self.hessian.diagonal()
        elif "mean_square" in collect:
            batch = x.square().mean(0)
            self.mean_square = batch if self.mean_square is None else self.mean_square.lerp_(batch, len(x) / self.tokens)
        if "absmax" in collect:
            batch = x.abs().amax(0)
            self.absmax = batch if self.absmax is None else torch.maximum(self.absmax, batch)


@dataclass
class Block:
    """A decoder block on the device, with its weights, and what its linear layers read.

    name    its path in the model, "model.layers.3"
    module  transformers' own decoder layer; a method changes its weights in place
    inputs  what its linear layers read, in the order in which they do
    dtypes  of its parameters and buffers in the checkpoint, by path in the block
    masks   of weights that are pruned already, bool [out, in], True where kept, by path in the block; every method keeps them
    """

    index: int
    name: str
    module: nn.Module
    dtypes: dict[str, torch.dtype]
    masks: dict[str, torch.Tensor]
    inputs: list[SharedInput] = field(default_factory=list)
    _walk: "Walk | None" = field(default=None, repr=False)

    def linear(self, path: str) -> nn.Linear:
        """Return a linear layer by its path in the block."""
        module = self.module.get_submodule(path)
        assert isinstance(module, nn.Linear)
        return module

    def mask(self, layers: tuple[str, ...]) -> torch.Tensor | None:
        """Stack the masks of layers that share an input by rows, [out, in]; None where none of their weights is pruned."""
        if not any(f"{path}.weight" in self.masks for path in layers):
            return None
        return torch.cat([self.masks.get(f"{path}.weight", torch.ones_like(self.linear(path).weight, dtype=torch.bool)) for path in layers])

    def each_input(self) -> Iterator[SharedInput]:
        """Yield `inputs` one after another and report progress; drop the statistics of each before the next."""
        assert self._walk is not None
        for shared in self.inputs:
            self._walk.tell(self, shared.layers)
            yield shared
            shared.hessian = shared.mean_square = shared.absmax = None

    def passes(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the windows' hidden states before and after the block as it is now, [windows, length, hidden] each, batch by batch."""
        assert self._walk is not None
        yield from self._walk.passes(self)


class Walk:
    """A walk over the blocks of a dense checkpoint; iterate over it.

    The consumer may change a block's weights before it asks for the next one: the windows then run through the changed block.
    Weights and activations are float32 on the CPU and the checkpoint's dtype elsewhere; between blocks they are kept in the checkpoint's dtype.

    Args:
        checkpoint: A dense checkpoint.
        windows: Token ids, int64 [count, length].
        collect: The statistics of the layers' inputs to collect.
        context: Device and progress.
        first: The block to begin with: an interrupted walk resumes there.
        states: The hidden states that enter block `first`; None computes those that enter block 0.
        passed: Called with a block when the windows have run through it and `states` holds what enters the next one.

    Raises:
        Incompatible: The checkpoint is quantized, or its blocks have no linear layers.
        UnusableData: The windows are not int64 [count, length] within the model's length.
        UnusableModel: Hidden states leave the range of the model's dtype.
    """

    def __init__(
        self, checkpoint: Checkpoint, windows: torch.Tensor, *, collect: Collect = HESSIAN, context: Context,
        first: int = 0, states: HiddenStates | None = None, passed: "Callable[[Block], None] | None" = None,
    ):  # fmt: skip
        check_windows(checkpoint, windows)
        self.checkpoint, self.windows, self.collect, self.context = checkpoint, windows, collect, context
        self.first, self._given, self._passed = first, states, passed
        self.model = skeleton(checkpoint, _compute_dtype(checkpoint, context.device))
        layers = self.model.get_submodule(checkpoint.blocks)
        assert isinstance(layers, nn.ModuleList)
        self.layers = layers
        fill_buffers(self.model, context.device)
        linear_layers(self.model, checkpoint)
        self.linears = [[path for path, part in layer.named_modules() if isinstance(part, nn.Linear)] for layer in layers]

    @property
    def states(self) -> HiddenStates:
        """The hidden states that enter the block that comes next."""
        return self._states

    @torch.no_grad()
    def __iter__(self) -> Iterator[Block]:
        entered, self._arguments = _enter(self)
        self._states = self._given or entered
        for index in range(self.first, len(self.layers)):
            block = self._load_block(index)
            self.tell(block, ())
            if self.collect:
                _gather(block, self)
            yield block
            for number, (_, after) in enumerate(self.passes(block)):
                self._states[number] = after
            if self._passed is not None:
                self._passed(block)
            block.inputs.clear()
            block.masks.clear()
            block.module.to("meta")
        total = sum(map(len, self.linears))
        self.context.progress(total, total, "calibrated")

    def tell(self, block: Block, layers: tuple[str, ...]) -> None:
        """Report the layers of a block that the method works on now."""
        here = self.linears[block.index]
        done = sum(map(len, self.linears[: block.index])) + (here.index(layers[0]) if layers else 0)
        what = ", ".join(path.rpartition(".")[2] for path in layers) or "running the calibration windows"
        self.context.progress(done, sum(map(len, self.linears)), f"block {block.index + 1} of {len(self.layers)}: {what}")

    @torch.no_grad()
    def passes(self, block: Block) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for number in range(len(self._states)):
            before, after = self.run(block, number)
            if not torch.isfinite(after.to(self._states.dtype)).all():
                raise UnusableModel(f"{self.checkpoint.path}: the hidden states behind {block.name} are not finite in {self._states.dtype}")
            yield before, after

    def run(self, block: Block, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Run one batch through a block; return its hidden states before and after."""
        before = self._states[number].to(self.context.device, _compute_dtype(self.checkpoint, self.context.device))
        positional, named = self._arguments[number][block.index]
        after = block.module(before, *positional, **named)
        return before, after[0] if isinstance(after, tuple) else after

    def _load_block(self, index: int) -> Block:
        name = f"{self.checkpoint.blocks}.{index}"
        module = self.layers[index]
        dtypes = _load(module, self.checkpoint, name, self.context.device)
        masks: dict[str, torch.Tensor] = {}
        if self.checkpoint.sparse:
            stored = read_masks(self.checkpoint.path, prefix=f"{name}.")
            masks = {path.removeprefix(f"{name}."): mask.to(self.context.device) for path, mask in stored.items()}
        return Block(index, name, module, dtypes, masks, _walk=self)


def check_windows(checkpoint: Checkpoint, windows: torch.Tensor) -> None:
    """Raise what `Walk` raises for windows and layouts."""
    if checkpoint.layout != "dense":
        raise Incompatible(f"{checkpoint.path} is quantized already ({checkpoint.layout}); calibration needs a dense checkpoint")
    if windows.dtype != torch.int64 or windows.dim() != 2 or not windows.numel():
        raise UnusableData(f"calibration windows must be int64 [count, length], not {windows.dtype} {list(windows.shape)}")
    if windows.shape[1] > checkpoint.max_length:
        raise UnusableData(f"calibration windows of {windows.shape[1]} tokens are longer than the model takes ({checkpoint.max_length})")
    if int(windows.min()) < 0 or int(windows.max()) >= checkpoint.vocab_size:
        raise UnusableData(f"calibration windows hold token ids outside the model's vocabulary of {checkpoint.vocab_size}")


def _compute_dtype(checkpoint: Checkpoint, device: str) -> torch.dtype:
    return torch.float32 if torch.device(device).type == "cpu" else getattr(torch, checkpoint.dtype)


def _load(module: nn.Module, checkpoint: Checkpoint, name: str, device: str) -> dict[str, torch.dtype]:
    """Fill a module of the skeleton from the checkpoint, buffers too; returns the dtypes its tensors have there."""
    dtype = next(module.parameters()).dtype
    paths = list(module.state_dict())
    tensors = read_tensors(checkpoint.path, [f"{name}.{path}" for path in paths])
    dtypes = {path: tensors[f"{name}.{path}"].dtype for path in paths}
    module.load_state_dict({path: _computable(tensors[f"{name}.{path}"], device, dtype) for path in paths}, assign=True)
    return dtypes


def _computable(tensor: torch.Tensor, device: str, dtype: torch.dtype) -> torch.Tensor:
    """Copy to the device, floating-point numbers in `dtype`."""
    return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype, copy=True)


def fill_buffers(model: PreTrainedModel, device: str) -> None:
    """Compute buffers that no checkpoint holds (rotary frequencies) the way transformers does after loading. All others are loaded after it.

    Raises Incompatible, naming it, for a buffer that transformers leaves as it is: what depends on what it held before was not computed.
    """
    stored = set(model.state_dict())
    waiting = [name for name, buffer in model.named_buffers() if buffer.is_meta and name not in stored]
    made: list[dict[str, torch.Tensor]] = []
    for before in (0, 1):  # not NaN: there are buffers of integers, too
        for name in waiting:
            path, _, own = name.rpartition(".")
            setattr(model.get_submodule(path), own, torch.full_like(model.get_buffer(name), before, device=device))
        _initialize(model, model)
        made.append({name: model.get_buffer(name) for name in waiting})
    left = [name for name in waiting if not torch.equal(made[0][name], made[1][name])]
    if left:
        raise Incompatible(
            f"{type(model).__name__} does not say how to compute its buffer {', '.join(left[:4])}, and no checkpoint holds it; "
            "a walk over this architecture would compute with memory that nothing has filled",
            key="model",
        )


def _initialize(part: nn.Module, owner: PreTrainedModel) -> None:
    """What transformers does to a module without weights: each model initializes its own parts, and itself last (it may fill their buffers)."""
    owner = part if isinstance(part, PreTrainedModel) else owner
    for child in part.children():
        _initialize(child, owner)
    owner._init_weights(part)


class _AllCollected(Exception):
    """Ends a forward pass whose further part is not needed."""


def _enter(walk: Walk) -> tuple[HiddenStates, list[list[Arguments]]]:
    """Run the windows through what stands before the blocks: their hidden states there, and what transformers passes to each block.

    The arguments are those of each batch; tensors that are equal in all of them (masks, positions) are held once.
    """
    _load_entrance(walk, torch.unique(walk.windows))
    seen: list[tuple[torch.Tensor, Arguments]] = []

    def record(hidden_states: torch.Tensor, *positional: Any, **named: Any) -> torch.Tensor:
        seen.append((hidden_states, (positional, named)))
        if len(seen) == len(walk.layers):
            raise _AllCollected
        return hidden_states

    for layer in walk.layers:
        layer.forward = record
    states = HiddenStates(getattr(torch, walk.checkpoint.dtype))
    arguments: list[list[Arguments]] = []
    for batch in walk.windows.split(max(1, TOKENS_PER_BATCH // walk.windows.shape[1])):
        seen.clear()
        with contextlib.suppress(_AllCollected):
            walk.model.base_model(input_ids=batch.to(walk.context.device), use_cache=False)
        states.append(seen[0][0])
        passed = [given for _, given in seen]
        arguments.append(_sharing(passed, arguments[-1]) if arguments else passed)
    for layer in walk.layers:
        del layer.forward
    walk.model.get_input_embeddings().to("meta")
    return states, arguments


def _sharing(new: Any, old: Any) -> Any:
    """`new` with the tensors of `old` that are the same."""
    if isinstance(new, torch.Tensor) and isinstance(old, torch.Tensor):
        return old if new.dtype == old.dtype and torch.equal(new, old) else new
    if type(new) is type(old) is dict:
        return {key: _sharing(value, old.get(key)) for key, value in new.items()}
    if type(new) is type(old) and type(new) in (tuple, list) and len(new) == len(old):
        return type(new)(_sharing(*pair) for pair in zip(new, old, strict=True))
    return new


def _load_entrance(walk: Walk, used: torch.Tensor) -> None:
    """Load what stands around the blocks but the head; of the token embedding only the rows of the ids `used` (ascending), which it looks up."""
    model, embed, device = walk.model, walk.model.get_input_embeddings(), walk.context.device
    skipped = {*walk.layers.modules(), model.get_output_embeddings()}
    dtype, stored = _compute_dtype(walk.checkpoint, device), set(model.state_dict())
    if isinstance(embed, nn.Embedding):
        embed.padding_idx = None  # it names a row that may not be among those
    ids = used.to(device)
    embed.register_forward_pre_hook(lambda _, arguments: (torch.searchsorted(ids, arguments[0]), *arguments[1:]))
    for path, part in model.named_modules():
        if part in skipped:
            continue
        own = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
        for name, value in [(name, value) for name, value in own if f"{path}.{name}" in stored]:
            full = f"{path}.{name}"
            tensor = read_tensors(walk.checkpoint.path, [full])[full]
            loaded = _computable(tensor[used] if part is embed and name == "weight" else tensor, device, dtype)
            setattr(part, name, nn.Parameter(loaded, requires_grad=False) if isinstance(value, nn.Parameter) else loaded)


def _gather(block: Block, walk: Walk) -> None:
    """Run the batches through the block up to its last linear layer, and gather the statistics of its linear layers' inputs."""
    by_layer: dict[str, SharedInput] = {}
    last: list[tuple[torch.Tensor, SharedInput]] = []
    called = expected = 0  # calls of linear layers in this batch, and in the first

    def hook(path: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def before(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            nonlocal called
            (x,) = arguments
            if last and last[0][0] is x:  # the very tensor that the layer before read
                if path not in by_layer:
                    shared = last[0][1]
                    shared.layers = (*shared.layers, path)
                    by_layer[path] = shared
            else:
                if path not in by_layer:
                    by_layer[path] = SharedInput((path,))
                    block.inputs.append(by_layer[path])
                by_layer[path].add(x, walk.collect)
                last[:] = [(x, by_layer[path])]
            called += 1
            if called == expected:
                raise _AllCollected

        return before

    handles = [block.linear(path).register_forward_pre_hook(hook(path)) for path in walk.linears[block.index]]
    for number in range(len(walk.states)):
        called = 0
        with contextlib.suppress(_AllCollected):
            walk.run(block, number)
        last.clear()
        expected = called
    for handle in handles:
        handle.remove()
    if unread := [path for path in walk.linears[block.index] if path not in by_layer]:
        raise Incompatible(
            f"{walk.checkpoint.path}: no calibration window reaches {', '.join(f'{block.name}.{path}' for path in unread[:4])}, so nothing is "
            "known of what it reads and it would stay as it is",
            key="model",
        )


def walk(checkpoint: Checkpoint, windows: torch.Tensor, *, collect: Collect = HESSIAN, context: Context) -> Iterator[Block]:
    """Yield the blocks of a `Walk` from the first to the last."""
    yield from Walk(checkpoint, windows, collect=collect, context=context)
