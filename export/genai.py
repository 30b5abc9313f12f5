"""A checkpoint as an ONNX Runtime GenAI package: fused attention, 4-bit MatMulNBits weights, tokenizer and search settings."""

import json
import tempfile
import time
from pathlib import Path

import onnxruntime_genai as og
from onnxruntime_genai.models import builder

from compression.checkpoints.checkpoint import open_checkpoint
from compression.checkpoints.loading import copy_tokenizer, load_tokenizer
from compression.checkpoints.tokenizer_corpus import TEXTS, every_two_byte_character
from compression.context import Context
from export.atomic_directory import whole
from export.checks import check_genai, outer_types
from export.quiet import quiet_and_offline

HEAD, EMBEDDING = "/lm_head/MatMul", "/model/embed_tokens/Gather"  # the builder's node names
# The fp16 graph that the builder (0.18) writes for the CPU prefills and then fails to decode; the one for CUDA has the
# fused attention of the other precisions, and runs on the CPU as well.
PROVIDER = {"int4": "cpu", "fp32": "cpu", "fp16": "cuda"}


def export_genai(
    checkpoint: Path,
    out: Path,
    *,
    precision: str,
    block_size: int = 32,
    embedding_type: str | None = None,
    head_type: str | None = None,
    accuracy_level: int = 4,
    context: Context,
) -> dict[str, float]:
    """Write a GenAI package into `out` with GenAI's own model builder; return its bytes, the seconds it took, and
    `tokenizer_differences`: how many of the torture texts GenAI's tokenizer encodes otherwise than the checkpoint's.

    precision       of weights. int4 rounds a dense checkpoint's linear layers to the nearest symmetric code in blocks;
                    of a GPTQ or AWQ checkpoint it carries codes, scales and zero points as they are
    block_size      weights that share a scale, for what is rounded here (carried codes keep their own group size)
    embedding_type, head_type  the float type of the package, or int4; a tied head is stored once
    accuracy_level  how MatMulNBits multiplies: 4 rounds activations to int8 (faster), 1 keeps float32
    Raises Incompatible for what `check_genai` refuses, UnusableModel for a directory that cannot be opened.
    """
    started = time.perf_counter()
    source = open_checkpoint(checkpoint)
    check_genai(
        source, precision=precision, block_size=block_size, embedding_type=embedding_type, head_type=head_type,
        accuracy_level=accuracy_level,
    )  # fmt: skip
    types = outer_types(source, type=precision, embedding_type=embedding_type, head_type=head_type)
    floats = [node for node, kind in zip((EMBEDDING, HEAD), types, strict=True) if kind != "int4"]
    options = [f"block_size={block_size}", f"accuracy_level={accuracy_level}", "hf_token=false", "fuse_qk_norm_gqa=false"]
    if floats:
        options.append(f"nodes_to_exclude={','.join(floats)}")
    with whole(out) as place:
        with tempfile.TemporaryDirectory() as cache, quiet_and_offline():
            target = (None, str(checkpoint.resolve()), str(place), precision, PROVIDER[precision], cache)
            builder.create_model(*target, **builder.parse_extra_options(*target, options))
        _leave_provider_open(place / "genai_config.json")
        copy_tokenizer(checkpoint, place)  # the builder saves it again in its own words; these are the checkpoint's, byte for byte
        differences = _tokenizer_differences(place)
        if differences:
            text, expected, found = differences[0]
            context.warn(
                f"GenAI's tokenizer encodes {len(differences)} texts otherwise than the checkpoint's, the first {text!r}: {found} where "
                f"{expected} is right; give the package token ids of the Hugging Face tokenizer where such text matters"
            )
    context.progress(1, 1, "written")
    return {
        "bytes": sum(f.stat().st_size for f in out.rglob("*") if f.is_file()),
        "seconds": time.perf_counter() - started,
        "tokenizer_differences": float(len(differences)),
    }


def _leave_provider_open(file: Path) -> None:
    """The package runs on the CPU unless whoever opens it names another execution provider."""
    config = json.loads(file.read_text())
    config["model"]["decoder"]["session_options"]["provider_options"] = []
    file.write_text(json.dumps(config, indent=4) + "\n")


def _tokenizer_differences(package: Path) -> list[tuple[str, list[int], list[int]]]:
    """Torture texts (text, its ids in transformers, its ids in GenAI) that the two tokenizers encode otherwise.

    With special tokens, which GenAI adds only when told to (`update_options(add_special_tokens="true")`). Texts with NUL are left out:
    GenAI takes C strings.
    """
    expected, found = load_tokenizer(package), og.Tokenizer(str(package))
    found.update_options(add_special_tokens="true")
    special = [form for token in expected.all_special_tokens for form in (token, f"one{token}two", f"one {token} two\n{token}")]
    texts = [text for text in (*TEXTS, *every_two_byte_character(), *special) if "\0" not in text]
    pairs = [(text, list(expected(text, verbose=False)["input_ids"]), [int(i) for i in found.encode(text)]) for text in texts]
    return [(text, right, wrong) for text, right, wrong in pairs if right != wrong]
