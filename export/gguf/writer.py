"""Write a checkpoint as one GGUF file that llama.cpp opens, and prove its tokenizer."""

import contextlib
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import torch

from compression.checkpoints.checkpoint import Checkpoint, open_checkpoint
from compression.context import Context
from compression.errors import Incompatible
from compression.origin import Origin
from export.gguf.architectures import ARCHITECTURES, context_length
from export.gguf.check import GgufSettings, check_gguf
from export.gguf.importance import gather_importance
from export.gguf.metadata import write_hyperparameters, write_origin, write_vocabulary
from export.gguf.native import file_type, prove_tokenizer, quantize, require_llama
from export.gguf.tensors import Types, model_tensors, tensor_name, tensor_names
from export.gguf.tokenizer import Vocabulary, read_vocabulary
from export.gguf.types import CARRY, QUANTIZED, is_fallback, row_multiple

FILE = "model.gguf"


def export_gguf(
    checkpoint: Path,
    out: Path,
    settings: GgufSettings,
    *,
    windows: torch.Tensor | None = None,
    threads: int = 1,
    origin: Origin | None = None,
    context: Context,
) -> dict[str, float]:
    """Write a checkpoint as one GGUF file, and prove in llama.cpp that its tokenizer agrees.

    Example:
        settings = GgufSettings(type="q4_k_m", embedding_type="q8_0")
        export_gguf(Path("model"), Path("model-gguf"), settings, threads=4, context=Context())

    Args:
        checkpoint: A dense checkpoint, or a GPTQ or AWQ one: `type` "carry" takes its codes as they are, float types dequantize them.
        out: Directory for `model.gguf`; after a failure nothing is written.
        settings: Types of the linear layers (`export.gguf.types.TYPES`), and of embedding and head (`TENSOR_TYPES`).
        windows: Calibration token ids, int64 [count, length], on which the importance matrix is gathered; for importance only.
        threads: Threads of llama.cpp's quantizer.
        origin: What the model was made of, for the file's `general.*`.
        context: Receives progress and warnings.

    Returns:
        `bits_per_weight` over every tensor in the file; `tokenizer_texts`, how many texts llama.cpp encodes like the tokenizer (all);
        `fallback_tensors`, how many linear layers have another type than `type` because its blocks do not divide their rows; and with
        "carry" `carry_worst_difference`, of a weight to the checkpoint's, and `carry_worst_difference_in_steps` of that weight's scale.

    Raises:
        Incompatible: `check_gguf` refuses the checkpoint, windows are missing or not needed, or llama.cpp tokenizes otherwise.
        UnusableModel: The checkpoint cannot be opened.
        UnusableData: The calibration walk cannot use the windows.
        MissingExtra: llama-cpp-python is not installed.
    """
    require_llama()
    source, type = open_checkpoint(checkpoint), settings.type
    check_gguf(source, settings)
    if (windows is not None) != settings.importance:
        raise Incompatible("calibration windows are for importance: true, and it needs them", key="importance")
    vocabulary = read_vocabulary(source.path, source.vocab_size)
    _warn(source, vocabulary, settings, context)
    embedding, head = settings.outer_types(source)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".gguf-", dir=out) as work:
        importance = {} if windows is None else gather_importance(source, windows, context, work=Path(work) / "dense")
        file = Path(work) / FILE
        types = Types("f32" if type in QUANTIZED else type, embedding, head)
        metrics = write_model(file, source, vocabulary, types, context, importance, origin)
        if type in QUANTIZED:
            full, file = file, Path(work) / f"{type}.gguf"
            names = tensor_names(source)
            weights = {tensor_name(name, names): values for name, values in importance.items()}
            quantize(full, file, type, embedding_type=embedding, head_type=head, importance=weights, threads=threads, work=Path(work))
        metrics |= {"tokenizer_texts": float(prove_tokenizer(file, vocabulary))} | _measure(file, type, context)
        file.replace(out / FILE)
    return metrics


def write_model(
    file: Path,
    checkpoint: Checkpoint,
    vocabulary: Vocabulary,
    types: Types,
    context: Context,
    importance: Mapping[str, np.ndarray] | None = None,
    origin: Origin | None = None,
) -> dict[str, float]:
    """Write the GGUF file. Tensors wait on disk for the header, so that memory holds one at a time."""
    written: Counter[str] = Counter()
    difference, steps = 0.0, 0.0
    architecture = ARCHITECTURES[checkpoint.model_type].name
    with contextlib.closing(gguf.GGUFWriter(file, architecture, use_temp_file=True)) as writer:
        for tensor in model_tensors(checkpoint, types, importance or {}):
            writer.add_tensor(tensor.name, tensor.array, raw_dtype=gguf.GGMLQuantizationType[tensor.type.upper()])
            written[tensor.type] += tensor.linear
            difference, steps = max(difference, tensor.difference), max(steps, tensor.difference_in_steps)
            context.progress(written.total(), checkpoint.num_layers * len(checkpoint.family.linears), tensor.name)
        write_origin(writer, checkpoint, origin, strips=vocabulary.strips)
        write_hyperparameters(writer, checkpoint, file_type(max(written, key=lambda type: written[type])))
        write_vocabulary(writer, vocabulary)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return {"carry_worst_difference": difference, "carry_worst_difference_in_steps": steps} if types.linear == CARRY else {}


def _warn(checkpoint: Checkpoint, vocabulary: Vocabulary, settings: GgufSettings, context: Context) -> None:
    for loss in vocabulary.losses:
        context.warn(loss)
    if vocabulary.definition.composes:
        context.warn("this tokenizer composes text to NFC and llama.cpp does not: compose prompts before they reach llama.cpp")
    if "marks" in vocabulary.definition.inexact:
        context.warn(
            "llama.cpp ends words at combining marks, which this tokenizer keeps in them: text in Hindi, Bengali, Thai and the like becomes "
            "other tokens than the model was trained on"
        )
    if "capitals" in vocabulary.definition.inexact:
        context.warn(
            "this tokenizer begins a new word where a capital letter follows a small one, llama.cpp only in ASCII: words such as мирТруд may "
            "become other tokens"
        )
    if vocabulary.keeps_blanks:
        context.warn(
            f"llama.cpp keeps the blanks behind {', '.join(sorted(vocabulary.keeps_blanks)[:4])}, which this tokenizer swallows: put no blanks there"
        )
    if vocabulary.definition.prepend == "metaspace":
        context.warn(
            "llama.cpp puts a space in front of every text and after every special token, this tokenizer only where there is none: "
            "prompts that begin with a space, or continue after a special token, differ by a space token"
        )
    if cut := context_length(checkpoint)[1]:
        context.warn(cut)
    if settings.requantize:
        context.warn(f"the codes of this {checkpoint.layout} checkpoint are rounded a second time, to {settings.type} (requantize: true)")


def _measure(file: Path, type: str, context: Context) -> dict[str, float]:
    """Count the bits and the fallbacks that are in the file."""
    tensors = gguf.GGUFReader(file).tensors
    weights, bytes_ = sum(int(t.n_elements) for t in tensors), sum(int(t.n_bytes) for t in tensors)
    fallbacks: Counter[str] = Counter()
    for tensor in tensors:
        stored, (block, _) = tensor.tensor_type.name.lower(), gguf.GGML_QUANT_SIZES[tensor.tensor_type]
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2 and is_fallback(stored, block, type):
            fallbacks[f"{tensor.name.split('.')[2]} (rows of {tensor.shape[0]}) in {stored}"] += 1
    if fallbacks:
        context.warn(
            f"{fallbacks.total()} tensors are in another type than {type}, whose rows are multiples of {row_multiple(type)}: "
            f"{', '.join(f'{count} {layer}' for layer, count in sorted(fallbacks.items()))}"
        )
    return {"bits_per_weight": 8 * bytes_ / weights, "fallback_tensors": float(fallbacks.total())}
