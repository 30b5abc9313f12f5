"""A checkpoint as an ONNX Runtime GenAI package: fused attention, 4-bit MatMulNBits weights, tokenizer and search settings."""

import json
import tempfile
import time
from pathlib import Path
from typing import Literal

from onnxruntime_genai.models import builder

from compression.checkpoint import open_checkpoint
from compression.context import Context
from compression.loading import copy_tokenizer
from export.checks import check_genai
from export.quiet import quiet_and_offline

HEAD_AND_EMBEDDING = ("/lm_head/MatMul", "/model/embed_tokens/Gather")  # the builder's node names
# The fp16 graph that the builder (0.18) writes for the CPU prefills and then fails to decode; the one for CUDA has the
# fused attention of the other precisions, and runs on the CPU as well.
PROVIDER = {"int4": "cpu", "fp32": "cpu", "fp16": "cuda"}

Precision = Literal["int4", "fp32", "fp16"]


def export_genai(
    checkpoint: Path,
    out: Path,
    *,
    precision: Precision,
    block_size: int = 32,
    quantize_embeddings: bool = False,
    accuracy_level: Literal[1, 4] = 4,
    context: Context,
) -> dict[str, float]:
    """Write a GenAI package into `out` with GenAI's own model builder; return its bytes and the seconds it took.

    precision            of weights. int4 rounds a dense checkpoint's linear layers to the nearest symmetric code in blocks;
                         of a GPTQ or AWQ checkpoint it carries codes, scales and zero points as they are
    block_size           weights that share a scale, for what is rounded here (carried codes keep their own group size)
    quantize_embeddings  round the token embedding and the head to int4 too; otherwise they stay float32
    accuracy_level       how MatMulNBits multiplies: 4 rounds activations to int8 (faster), 1 keeps float32
    Raises Incompatible for what `check_genai` refuses, UnusableModel for a directory that cannot be opened.
    """
    started = time.perf_counter()
    check_genai(
        open_checkpoint(checkpoint),
        precision=precision,
        block_size=block_size,
        quantize_embeddings=quantize_embeddings,
        accuracy_level=accuracy_level,
    )
    out.mkdir(parents=True, exist_ok=True)
    options = [f"block_size={block_size}", f"accuracy_level={accuracy_level}", "hf_token=false", "fuse_qk_norm_gqa=false"]
    if not quantize_embeddings:
        options.append(f"nodes_to_exclude={','.join(HEAD_AND_EMBEDDING)}")
    with tempfile.TemporaryDirectory() as cache, quiet_and_offline():
        source = str(checkpoint.resolve())
        target = (None, source, str(out), precision, PROVIDER[precision], cache)
        builder.create_model(*target, **builder.parse_extra_options(*target, options))
    _leave_provider_open(out / "genai_config.json")
    copy_tokenizer(checkpoint, out)  # the builder saves it again in its own words; these are the checkpoint's, byte for byte
    context.progress(1, 1, "written")
    return {"bytes": sum(f.stat().st_size for f in out.iterdir()), "seconds": time.perf_counter() - started}


def _leave_provider_open(file: Path) -> None:
    """The package runs on the CPU unless whoever opens it names another execution provider."""
    config = json.loads(file.read_text())
    config["model"]["decoder"]["session_options"]["provider_options"] = []
    file.write_text(json.dumps(config, indent=4) + "\n")
