"""What is compared: the methods, the models, the windows they are calibrated and scored with."""

import random
from dataclasses import dataclass
from pathlib import Path

import torch

from compression.checkpoints.loading import load_tokenizer
from compression.data import DataSpec, calibration_windows, evaluation_windows

CALIBRATION_WINDOWS, LENGTH = 64, 256
SCORED_WINDOWS = {"bench": 256, "reference": 64}
REFERENCE = Path(__file__).resolve().parents[3] / "compression" / "reference" / "model"

OURS, GPTQMODEL, LLMCOMPRESSOR = "edgepress", "gptqmodel", "llmcompressor"


@dataclass(frozen=True)
class Method:
    """A row of the table.

    peers       who has it; llm-compressor's magnitude pruning belongs to the training it no longer has, and does nothing in one shot
    calibrated  whether the calibration windows matter
    """

    title: str
    method: str
    peers: tuple[str, ...]
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool = True
    sparsity: float | None = None
    calibrated: bool = True


BOTH = (GPTQMODEL, LLMCOMPRESSOR)
METHODS = (
    Method("RTN 4-bit g32 symmetric", "rtn", BOTH, 4, 32, calibrated=False),
    Method("RTN 4-bit g32 asymmetric", "rtn", BOTH, 4, 32, symmetric=False, calibrated=False),
    Method("RTN 4-bit g128 asymmetric", "rtn", BOTH, 4, 128, symmetric=False, calibrated=False),
    Method("GPTQ 4-bit g32", "gptq", BOTH, 4, 32),
    Method("GPTQ 4-bit g128", "gptq", BOTH, 4, 128),
    Method("GPTQ 3-bit g128", "gptq", BOTH, 3, 128),
    Method("AWQ 4-bit g32", "awq", BOTH, 4, 32, symmetric=False),
    Method("AWQ 4-bit g128", "awq", BOTH, 4, 128, symmetric=False),
    Method("magnitude 50%", "magnitude", (), sparsity=0.5, calibrated=False),
    Method("Wanda 50%", "wanda", (LLMCOMPRESSOR,), sparsity=0.5),
    Method("SparseGPT 50%", "sparsegpt", (LLMCOMPRESSOR,), sparsity=0.5),
)


@dataclass(frozen=True)
class Subject:
    """A model and its windows.

    draws   calibration windows, int64 [windows, length] each
    scored  windows for perplexity, int64 [windows, length]
    """

    title: str
    checkpoint: Path
    draws: tuple[torch.Tensor, ...]
    scored: torch.Tensor


def bench_subject(folder: Path, draws: int) -> Subject:
    """The model of a bench directory (llama-6m/, text/wikitext2_valid.txt, text/wikitext2_test.txt), calibrated on validation, scored on test."""
    checkpoint = folder / "llama-6m"
    tokenizer = load_tokenizer(checkpoint)
    valid, test = (
        torch.tensor(tokenizer((folder / "text" / f"wikitext2_{split}.txt").read_text(), verbose=False)["input_ids"])
        for split in ("valid", "test")
    )
    return Subject("llama-6m", checkpoint, drawn(windows(valid), draws), windows(test)[: SCORED_WINDOWS["bench"]])


def reference_subject(draws: int) -> Subject:
    """The model that edgepress carries, on the text of its embedded world."""
    tokenizer = load_tokenizer(REFERENCE)
    spec = DataSpec(text="embedded", length=LENGTH, calibration_windows=CALIBRATION_WINDOWS, evaluation_windows=SCORED_WINDOWS["reference"])
    rows = tuple(calibration_windows(spec, tokenizer, draw) for draw in range(draws))
    return Subject("the reference model", REFERENCE, rows, evaluation_windows(spec, tokenizer))


def windows(tokens: torch.Tensor) -> torch.Tensor:
    """Neighbouring windows that do not overlap, the remainder dropped: int64 [count, LENGTH]."""
    return tokens[: len(tokens) // LENGTH * LENGTH].reshape(-1, LENGTH)


def drawn(rows: torch.Tensor, draws: int) -> tuple[torch.Tensor, ...]:
    """Calibration draws of the same text: the first windows, then windows picked with the draw's number as the seed."""
    picks = [list(range(CALIBRATION_WINDOWS))]
    picks += [random.Random(draw).sample(range(len(rows)), CALIBRATION_WINDOWS) for draw in range(1, draws)]
    return tuple(rows[pick] for pick in picks)
