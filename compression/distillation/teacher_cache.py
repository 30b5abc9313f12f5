"""Outputs of a teacher on the training rows, computed once, kept on disk, and shared by all stages that need the same.

    <folder>/<key>/checkpoint-1/   numpy arrays [positions, ...], the output head, sha256 of each (compression/resumption.py)
    <folder>/<key>.lock            locked by the process that computes; the others wait, then read its result

A key covers all that decides the bytes: the teacher's files, rows and mask, settings, device type, threads, versions. The order in which
a training draws its rows is not part of it.
"""

import hashlib
import json
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from compression.checkpoints.loading import load_model
from compression.context import Context
from compression.distillation.features import extract_features
from compression.distillation.losses import MAX_LOGITS, log_probabilities, merge_tail
from compression.distillation.settings import CacheSettings
from compression.distillation.targets import HeadTargets, Targets, TopTargets
from compression.errors import EdgepressError, Incompatible
from compression.files import digest_file
from compression.locks import file_lock
from compression.resumption import latest_checkpoint, write_checkpoint

FORMAT = 1  # raise it when the same key would have other bytes
TOKENS_PER_FORWARD = 4096
HEAD = "head.safetensors"
ARRAYS = {"full": ("hidden",), "top_k": ("indices", "log_probs")}


class TeacherCache:
    """Teacher outputs at the counted positions of rows, read from disk when they are needed.

    Attributes:
        targets: Turns the outputs into distributions.
        settings: What is kept of them.
        temperature: Temperature of the distributions.
        built: Whether this process ran the teacher.
    """

    def __init__(
        self,
        home: Path,
        rows: torch.Tensor,
        mask: torch.Tensor,
        targets: Targets,
        settings: CacheSettings,
        *,
        temperature: float,
        built: bool,
    ):
        self.targets, self.settings, self.temperature, self.built = targets, settings, temperature, built
        self._arrays = [np.load(home / f"{name}.npy", mmap_mode="r") for name in ARRAYS[settings.keep]]
        ends = mask[:, 1:].sum(1).cumsum(0).tolist()
        self._spans = dict(zip(_row_keys(rows, mask), pairwise([0, *ends]), strict=True))

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self._arrays)

    def read(self, input_ids: torch.Tensor, loss_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the arguments of `targets.compare` for the counted positions of int64 and bool [batch, length].

        A row is identified by its tokens and targets up to the last target, so rows may come in any order, padded or cut.

        Raises:
            EdgepressError: A row is not in the cache.
        """
        try:
            spans = [self._spans[key] for key in _row_keys(input_ids, loss_mask)]
        except KeyError:
            raise EdgepressError("the teacher cache was not made for a row of this batch", key="teacher_cache") from None
        parts = [np.concatenate([array[start:end] for start, end in spans]) for array in self._arrays]
        tensors = [torch.from_numpy(part).to(input_ids.device) for part in parts]
        return tuple(tensor.float() if tensor.is_floating_point() else tensor.long() for tensor in tensors)


def open_teacher_cache(
    folder: Path,
    teacher: Path,
    rows: torch.Tensor,
    mask: torch.Tensor,
    *,
    settings: CacheSettings,
    vocabulary: int,
    temperature: float,
    context: Context,
) -> TeacherCache:
    """Open the cache of a teacher for some rows; run the teacher first where there is none, or where its bytes are damaged.

    The teacher runs in float32, with any precision of the training.

    Args:
        folder: Holds the caches of all teachers and rows.
        teacher: Its checkpoint.
        rows: int64 [n, length].
        mask: bool [n, length], true where a token is a target.
        settings: What to keep.
        vocabulary: Number of tokens that student and teacher both embed.
        temperature: Temperature of the distributions; it decides the bytes on disk with `top_k` only.
        context: Device and callbacks.

    Raises:
        Incompatible: The output head is not a linear layer, or an output is not finite in the dtype.
        UnusableModel: The teacher cannot be read.
    """
    document = {
        "format": FORMAT, "teacher": {f.name: digest_file(f) for f in sorted(teacher.glob("*.safetensors"))} | {"config": digest_file(teacher / "config.json")},
        "rows": _digest(rows), "mask": _digest(mask), "length": rows.shape[1], "keep": settings.keep, "dtype": settings.dtype, "vocabulary": vocabulary,
        "top_k": [settings.top_k, temperature] if settings.keep == "top_k" else None, "device": torch.device(context.device).type,
        "threads": torch.get_num_threads(), "libraries": {name: version(name) for name in ("torch", "transformers")},
    }  # fmt: skip
    key = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    home = folder / key
    home.mkdir(parents=True, exist_ok=True)
    with file_lock(folder / f"{key}.lock"):
        found = latest_checkpoint(home, run=key, warn=lambda _: context.warn(f"the teacher cache {home} is damaged and is computed again"))
        built = found is None
        if found is None:
            model = load_model(teacher, device=context.device)
            write_checkpoint(home, 1, lambda out: _fill(out, model, rows, mask, settings, vocabulary, temperature, context), run=key)
            found = home / "checkpoint-1"
    targets = _head_targets(found, vocabulary, temperature, context) if settings.keep == "full" else TopTargets(vocabulary)
    return TeacherCache(found, rows, mask, targets, settings, temperature=temperature, built=built)


@torch.no_grad()
def _fill(
    out: Path,
    model: PreTrainedModel,
    rows: torch.Tensor,
    mask: torch.Tensor,
    settings: CacheSettings,
    vocabulary: int,
    temperature: float,
    context: Context,
) -> None:
    """Write the arrays batch by batch: they may be larger than the memory."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise Incompatible(f"the output head of the teacher is {type(head).__name__}, and the cache keeps linear ones", key="teacher_cache")
    if settings.keep == "full":
        save_file({name: tensor.cpu().contiguous() for name, tensor in head.state_dict().items()}, out / HEAD)
    positions = int(mask[:, 1:].sum())
    shapes: dict[str, tuple[int, Any]] = {
        "hidden": (head.in_features, settings.dtype), "indices": (settings.top_k, "int32"), "log_probs": (settings.top_k + 1, settings.dtype),
    }  # fmt: skip
    arrays = {
        name: open_memmap(out / f"{name}.npy", mode="w+", dtype=shapes[name][1], shape=(positions, shapes[name][0]))
        for name in ARRAYS[settings.keep]
    }
    done = 0
    at_once = max(1, TOKENS_PER_FORWARD // rows.shape[1])
    for batch, targets in zip(rows.split(at_once), mask.split(at_once), strict=True):
        hidden = extract_features(
            model, batch.to(context.device), targets[:, 1:].to(context.device), (), "hidden_mse", max_logits=MAX_LOGITS
        ).last
        outputs = [hidden] if settings.keep == "full" else _likeliest(hidden, head, settings.top_k, vocabulary, temperature)
        for array, tensor in zip(arrays.values(), outputs, strict=True):
            array[done : done + len(tensor)] = tensor.cpu().numpy()
            if not np.isfinite(array[done : done + len(tensor)]).all():
                raise Incompatible(f"an output of the teacher is not finite in {settings.dtype}; take float32", key="cache_dtype")
        done += len(hidden)
        context.progress(done, positions, "teacher cache")
    for array in arrays.values():
        array.flush()


def _likeliest(hidden: torch.Tensor, head: nn.Linear, k: int, vocabulary: int, temperature: float) -> list[torch.Tensor]:
    """Return indices [n, k] of the likeliest tokens and log-probabilities [n, k + 1] of each and of the rest, with few logits in memory at once."""
    indices, log_probs = [], []
    for part in hidden.split(max(1, MAX_LOGITS // head.out_features)):
        whole = log_probabilities(head(part)[:, :vocabulary], temperature)
        indices.append(whole.topk(k, dim=-1).indices)
        log_probs.append(merge_tail(whole, indices[-1]))
    return [torch.cat(indices), torch.cat(log_probs)]


def _head_targets(home: Path, vocabulary: int, temperature: float, context: Context) -> HeadTargets:
    """Load the teacher's output head alone."""
    tensors = load_file(home / HEAD, device=context.device)
    outputs, inputs = tensors["weight"].shape
    head = nn.Linear(inputs, outputs, bias="bias" in tensors, device="meta")
    head.load_state_dict(tensors, assign=True)
    return HeadTargets(head.requires_grad_(False), vocabulary, temperature)


def _row_keys(rows: torch.Tensor, mask: torch.Tensor) -> list[bytes]:
    """Identify each row by its part up to the last target: what follows decides nothing in a causal model."""
    tokens, targets = rows.cpu().numpy(), mask.cpu().numpy().astype(bool)
    ends = [int(row.nonzero()[0].max(initial=-1)) + 1 for row in targets]
    return [row[:end].tobytes() + chosen[:end].tobytes() for row, chosen, end in zip(tokens, targets, ends, strict=True)]


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
