"""Prune, distil, quantize and export a small language model with plain function calls, and measure it after every step.

python docs/examples/compress.py --out compressed
python docs/examples/compress.py --model ./smollm2 --text corpus.txt --length 256 --steps 100 --out compressed
"""

import argparse
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

import compression.reference
from compression.checkpoints.loading import load_tokenizer
from compression.context import Context
from compression.data import DataSpec, calibration_windows, evaluation_windows, questions, training_rows
from compression.distillation import DistillationSettings, distill
from compression.evaluation.runtime import Runtime
from compression.evaluation.scorers import evaluate_quality
from compression.evaluation.speed import measure_speed
from compression.pruning import WidthSettings, prune_width
from compression.quantization.gptq import quantize_gptq
from compression.quantization.settings import GPTQSettings
from compression.training import TrainingRows
from export.gguf import GgufSettings, export_gguf
from export.runtimes import open_runtime

REFERENCE = Path(compression.reference.__file__).parent / "model"
THREADS = 2


def compress(model: Path, data: DataSpec, training: DistillationSettings, out: Path, *, keep: float) -> dict[str, dict[str, float]]:
    """Write every step's model below `out` and return the measurements of each: perplexity, distance to `model`, size, speed."""
    context = Context(seed=0, warn=print)
    tokenizer = load_tokenizer(model)
    calibration = calibration_windows(data, tokenizer, context.seed)
    pruned, distilled, gptq, gguf = (out / name for name in ("pruned", "distilled", "gptq", "gguf"))

    # Remove the MLP neurons with the smallest norms: an ordinary, narrower model remains.
    prune_width(model, pruned, WidthSettings(keep=keep), context=context)

    # Train it to predict what the original predicts. An interrupted training resumes from `workdir`.
    rows = TrainingRows(training_rows(data, tokenizer))
    distill(pruned, model, distilled, rows, training, workdir=out / "work", context=context)

    # Round the linear layers to 4 bits, each group of 32 weights with its own scale.
    quantize_gptq(distilled, gptq, GPTQSettings(bits=4, group_size=32), calibration, context=context)

    # Carry exactly those codes into a GGUF file: nothing is rounded a second time.
    export_gguf(gptq, gguf, GgufSettings(type="carry"), threads=THREADS, context=context)

    steps = {"base": model, "pruned": pruned, "distilled": distilled, "gptq": gptq, "gguf": gguf}
    return {name: measure(path, model, data, context) for name, path in steps.items()}


def measure(path: Path, base: Path, data: DataSpec, context: Context) -> dict[str, float]:
    """Measure a checkpoint or artifact in the runtime that opens it."""
    tokenizer = load_tokenizer(base)
    windows = evaluation_windows(data, tokenizer)
    asked = questions(data, "test")
    prompt = windows[0, :32].tolist()

    def opened() -> Runtime:
        return open_runtime(path, threads=THREADS)

    runtime, reference = opened(), open_runtime(base, threads=THREADS)
    quality = evaluate_quality(runtime, tokenizer, windows, asked, references={"base": reference}, context=context).metrics
    runtime.close()
    reference.close()
    weights = [file for pattern in ("*.safetensors", "*.gguf") for file in path.glob(pattern)]
    size = {"size_mb": sum(file.stat().st_size for file in weights) / 1e6}
    return size | quality | measure_speed(opened, prompt, new_tokens=32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument(
        "--model", type=Path, default=REFERENCE, help="directory of a Hugging Face checkpoint (default: the reference model)"
    )
    parser.add_argument("--text", help="a .txt, .jsonl or .parquet file (default: the embedded world)")
    parser.add_argument("--length", type=int, default=256, help="tokens in a row")
    parser.add_argument("--keep", type=float, default=0.5, help="share of the MLP neurons to keep")
    parser.add_argument("--steps", type=int, default=120, help="distillation steps")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    disable_progress_bar()
    source = {"text": {"path": options.text}} if options.text else {"text": "embedded", "questions": "embedded"}
    data = DataSpec.model_validate(source | {"length": options.length, "calibration_windows": 16, "evaluation_windows": 16})
    training = DistillationSettings(
        steps=options.steps, batch_size=options.batch_size, learning_rate=options.learning_rate, precision="bfloat16"
    )
    columns = ("size_mb", "perplexity", "kl_to_base", "accuracy", "tokens_per_second")
    measured = compress(options.model, data, training, options.out, keep=options.keep)
    print("| step |", " | ".join(columns), "|\n|---|" + "---:|" * len(columns))
    for name, figures in measured.items():
        print(f"| {name} |", " | ".join(f"{figures[column]:.4g}" if column in figures else "" for column in columns), "|")


if __name__ == "__main__":
    main()
