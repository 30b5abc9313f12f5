"""`export.gguf`: a checkpoint as one GGUF file that llama.cpp opens, with its tokenizer proven."""

import contextlib
import tempfile
from collections import Counter
from pathlib import Path

import gguf

from compression.checkpoint import Checkpoint, open_checkpoint
from compression.context import Context
from compression.loading import load_tokenizer
from export.gguf.check import ARCHITECTURES, CARRY, QUANTIZED, attention_window, check_gguf, tensor_types
from export.gguf.metadata import write_hyperparameters, write_vocabulary
from export.gguf.native import file_type, prove_tokenizer, quantize, require_llama
from export.gguf.tensors import Types, model_tensors
from export.gguf.tokenizer import Vocabulary, read_vocabulary

FILE = "model.gguf"


def export_gguf(
    checkpoint: Path, out: Path, *, type: str, embedding_type: str | None = None, head_type: str | None = None, threads: int = 1,
    context: Context,
) -> dict[str, float]:  # fmt: skip
    """Write `out`/model.gguf.

    type            one of export.gguf.check.TYPES, for the linear layers; "carry" takes the codes of a GPTQ or AWQ checkpoint as they are.
                    Norms and biases are float32 always
    embedding_type, head_type   f32, f16, bf16 or q8_0; None is `type` where that is a float type, else the checkpoint's own dtype
    threads         of llama.cpp's quantizer
    Returns bits_per_weight (over every tensor in the file), tokenizer_texts (proven equal), fallback_tensors
    (that llama.cpp could not give the type asked for) and, with "carry", carry_worst_difference (of a weight to the checkpoint's) and
    carry_worst_difference_in_steps (of that weight's scale).
    Raises Incompatible (`check_gguf`, or a tokenizer that comes out different in llama.cpp), UnusableModel, MissingExtra.
    """
    require_llama()
    source = open_checkpoint(checkpoint)
    check_gguf(source, type=type, embedding_type=embedding_type, head_type=head_type)
    tokenizer = load_tokenizer(checkpoint)
    vocabulary = read_vocabulary(tokenizer, source.vocab_size, source.config)
    _warn(source, vocabulary, context)
    embedding, head = tensor_types(source, type=type, embedding_type=embedding_type, head_type=head_type)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".gguf-", dir=out) as work:
        file = Path(work) / FILE
        metrics = write_model(file, source, vocabulary, Types("f32" if type in QUANTIZED else type, embedding, head), context)
        if type in QUANTIZED:
            full, file = file, Path(work) / f"{type}.gguf"
            quantize(full, file, type, embedding_type=embedding, head_type=head, threads=threads)
        metrics |= {"tokenizer_texts": float(prove_tokenizer(file, tokenizer, vocabulary))} | _measure(file, type, context)
        file.replace(out / FILE)
    return metrics


def write_model(file: Path, checkpoint: Checkpoint, vocabulary: Vocabulary, types: Types, context: Context) -> dict[str, float]:
    """Write the GGUF file. Tensors wait on disk for the header, so that memory holds one at a time."""
    written: Counter[str] = Counter()
    difference, steps = 0.0, 0.0
    with contextlib.closing(gguf.GGUFWriter(file, ARCHITECTURES[checkpoint.model_type], use_temp_file=True)) as writer:
        for tensor in model_tensors(checkpoint, types):
            writer.add_tensor(tensor.name, tensor.array, raw_dtype=gguf.GGMLQuantizationType[tensor.type.upper()])
            written[tensor.type] += tensor.linear
            difference, steps = max(difference, tensor.difference), max(steps, tensor.difference_in_steps)
            context.progress(written.total(), checkpoint.num_layers * len(checkpoint.family.linears), tensor.name)
        write_hyperparameters(writer, checkpoint, file_type(max(written, key=lambda type: written[type])))
        write_vocabulary(writer, vocabulary)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return {"carry_worst_difference": difference, "carry_worst_difference_in_steps": steps} if types.linear == CARRY else {}


def _warn(checkpoint: Checkpoint, vocabulary: Vocabulary, context: Context) -> None:
    if vocabulary.definition.composes:
        context.warn("this tokenizer composes text to NFC and llama.cpp does not: compose prompts before they reach llama.cpp")
    if vocabulary.definition.prepend == "metaspace":
        context.warn(
            "llama.cpp puts a space in front of every text and after every special token, this tokenizer only where there is none: "
            "prompts that begin with a space, or go on after a special token, differ by a space token"
        )
    window = attention_window(checkpoint.config)
    if window is not None and window < checkpoint.max_length:
        context.warn(
            "llama.cpp does not slide this model's attention: "
            f"its context is cut from {checkpoint.max_length} to the window of {window} tokens"
        )


def _measure(file: Path, type: str, context: Context) -> dict[str, float]:
    """What is really in the file."""
    tensors = gguf.GGUFReader(file).tensors
    weights, bytes_ = sum(int(t.n_elements) for t in tensors), sum(int(t.n_bytes) for t in tensors)
    fallbacks = [
        t.name
        for t in tensors
        if "_k" in type and t.name.startswith("blk.") and len(t.shape) == 2 and not t.tensor_type.name.endswith("_K")
    ]
    if fallbacks:
        context.warn(
            f"{len(fallbacks)} tensors are in another type than {type}, whose rows are multiples of 256: {', '.join(fallbacks[:4])}, ..."
        )
    return {"bits_per_weight": 8 * bytes_ / weights, "fallback_tensors": float(len(fallbacks))}
