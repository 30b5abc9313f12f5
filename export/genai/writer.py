"""Write a checkpoint as a GenAI package, with GenAI's own model builder."""

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
from export.atomic_directory import atomic_directory, export_figures
from export.genai.check import GenaiSettings, check_genai
from export.quiet import quiet_and_offline

HEAD, EMBEDDING = "/lm_head/MatMul", "/model/embed_tokens/Gather"  # the builder's node names
# The fp16 graph that the builder (0.18) writes for the CPU prefills and then fails to decode; the one for CUDA has the
# fused attention of the other precisions and runs on the CPU too.
PROVIDER = {"int4": "cpu", "fp32": "cpu", "fp16": "cuda"}


def export_genai(checkpoint: Path, out: Path, settings: GenaiSettings, *, context: Context) -> dict[str, float]:
    """Write a checkpoint as a package for ONNX Runtime GenAI.

    Example:
        settings = GenaiSettings(precision="int4", accuracy_level=1)
        export_genai(Path("model"), Path("model-genai"), settings, context=Context())

    Args:
        checkpoint: A dense checkpoint, whose linear layers int4 rounds to the nearest symmetric code, or a GPTQ or AWQ one, whose codes,
            scales and zero points are carried.
        out: Directory for the package; after a failure nothing is written.
        settings: Types of the weights, and how MatMulNBits multiplies.
        context: Receives progress, and a warning where GenAI's tokenizer encodes a text otherwise than the checkpoint's.

    Returns:
        `bytes` of all files in `out`, `seconds`, and `tokenizer_differences`: how many texts of the corpus GenAI's tokenizer encodes
        otherwise than the checkpoint's.

    Raises:
        Incompatible: `check_genai` refuses the checkpoint.
        UnusableModel: The checkpoint cannot be opened.
    """
    started = time.perf_counter()
    source = open_checkpoint(checkpoint)
    check_genai(source, settings)
    precision = settings.precision
    floats = [node for node, type in zip((EMBEDDING, HEAD), settings.outer_types(source), strict=True) if type != "int4"]
    options = [f"block_size={settings.block_size}", f"accuracy_level={settings.accuracy_level}", "hf_token=false", "fuse_qk_norm_gqa=false"]
    if floats:
        options.append(f"nodes_to_exclude={','.join(floats)}")
    with atomic_directory(out) as temporary:
        with tempfile.TemporaryDirectory() as cache, quiet_and_offline():
            target = (None, str(checkpoint.resolve()), str(temporary), precision, PROVIDER[precision], cache)
            builder.create_model(*target, **builder.parse_extra_options(*target, options))
        _leave_provider_open(temporary / "genai_config.json")
        copy_tokenizer(checkpoint, temporary)  # the builder rewrites the tokenizer's files; these are the checkpoint's, byte for byte
        differences = _tokenizer_differences(temporary)
        if differences:
            text, expected, encoded = differences[0]
            context.warn(
                f"GenAI's tokenizer encodes {len(differences)} texts otherwise than the checkpoint's, the first {text!r}: {encoded} where "
                f"{expected} is right; give the package token ids of the Hugging Face tokenizer where such text matters"
            )
    context.progress(1, 1, "written")
    return {**export_figures(out, started), "tokenizer_differences": float(len(differences))}


def _leave_provider_open(file: Path) -> None:
    """Name no execution provider: the package then runs on the CPU unless an application names another one."""
    config = json.loads(file.read_text())
    config["model"]["decoder"]["session_options"]["provider_options"] = []
    file.write_text(json.dumps(config, indent=4) + "\n")


def _tokenizer_differences(package: Path) -> list[tuple[str, list[int], list[int]]]:
    """Return the texts (text, its ids in transformers, its ids in GenAI) that the two tokenizers encode otherwise.

    The ids include special tokens, which GenAI does not add by default. Texts with NUL are left out: GenAI takes C strings.
    """
    reference, tokenizer = load_tokenizer(package), og.Tokenizer(str(package))
    tokenizer.update_options(add_special_tokens="true")
    special = [form for token in reference.all_special_tokens for form in (token, f"one{token}two", f"one {token} two\n{token}")]
    texts = [text for text in (*TEXTS, *every_two_byte_character(), *special) if "\0" not in text]
    encoded = [(text, list(reference(text, verbose=False)["input_ids"]), [int(i) for i in tokenizer.encode(text)]) for text in texts]
    return [(text, expected, ids) for text, expected, ids in encoded if expected != ids]
