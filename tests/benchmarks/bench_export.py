"""Our exports beside the tools people use by hand: `python -m tests.benchmarks.bench_export` writes its part of docs/benchmarks.md.

GGUF beside llama.cpp's converter and quantizer, GenAI packages beside the builder's own command. Every export is a process of its own,
imports included; the two sides take turns in speed. Embedding and head are of the same type on both sides.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import torch

from compression.checkpoints.loading import load_tokenizer
from compression.context import Context
from compression.evaluation.generation import generate
from compression.evaluation.runtime import Runtime
from compression.evaluation.scorers import evaluate_quality
from compression.evaluation.transformers_runtime import TransformersRuntime
from compression.quantization.gptq import quantize_gptq
from compression.quantization.settings import GPTQSettings
from export.gguf.pretokenizer import recognize
from export.runtimes import open_runtime
from tests.benchmarks import page
from tests.benchmarks.bench_compression import machine
from tests.benchmarks.compression.protocol import Subject, bench_subject, reference_subject
from tests.benchmarks.export.converter import official_converter

SCRIPTS = Path(__file__).with_name("export")
GGUF_TYPES = ("f16", "q8_0", "q4_0", "q4_k_m", "q6_k")
TURNS, PROMPT, NEW_TOKENS = 7, 64, 128


@dataclass
class Made:
    """An artifact of one side, and what was measured of it.

    parent  the checkpoint that it is compared with
    """

    title: str
    by: str
    path: Path
    parent: Path
    seconds: float
    figures: dict[str, float] = field(default_factory=dict)
    speeds: list[float] = field(default_factory=list)

    @property
    def megabytes(self) -> float:
        """Of the model's files, the tokenizer's not counted."""
        return sum(f.stat().st_size for f in self.path.iterdir() if f.suffix in (".gguf", ".onnx", ".data")) / 1e6


class Bench:
    """Makes artifacts in a folder, ours and theirs."""

    def __init__(self, folder: Path, subject: Subject, threads: int):
        self.folder, self.subject, self.threads = folder, subject, threads
        self.made: list[Made] = []
        tokenizer = json.loads((subject.checkpoint / "tokenizer.json").read_text())
        self.pre = recognize(tokenizer).pre

    def gguf(self, title: str, checkpoint: Path, *, ours: str, theirs: str) -> None:
        """A GGUF file of each side; ours and theirs are types."""
        options = {"type": ours, "threads": self.threads, "embedding_type": "f16", "head_type": "f16"}
        self._make(title, "edgepress", checkpoint, lambda out: [script("run_edgepress", "gguf", checkpoint, out, json.dumps(options))])
        self._make(title, "llama.cpp", checkpoint, lambda out: self._llama_cpp(checkpoint, out, theirs))

    def genai(self, title: str, checkpoint: Path) -> None:
        """An int4 package of each side."""
        options = "block_size=32 accuracy_level=4 hf_token=false".split()
        excluded = "nodes_to_exclude=/lm_head/MatMul,/model/embed_tokens/Gather"
        ours = {"precision": "int4", "block_size": 32, "accuracy_level": 4}
        self._make(title, "edgepress", checkpoint, lambda out: [script("run_edgepress", "genai", checkpoint, out, json.dumps(ours))])
        builder = [
            sys.executable,
            "-m",
            "onnxruntime_genai.models.builder",
            "-m",
            str(checkpoint),
            "-i",
            str(checkpoint),
            "-p",
            "int4",
            "-e",
            "cpu",
        ]
        self._make(
            title,
            "GenAI's builder",
            checkpoint,
            lambda out: [[*builder, "-o", str(out), "-c", str(self.folder / "cache"), "--extra_options", *options, excluded]],
        )

    def measure(self) -> None:
        """Quality of every artifact, then speed, the artifacts of a row taking turns."""
        tokenizer, windows = load_tokenizer(self.subject.checkpoint), self.subject.scored
        for made in self.made:
            parent, runtime = TransformersRuntime(made.parent, threads=self.threads), open_runtime(made.path, threads=self.threads)
            made.figures = evaluate_quality(runtime, tokenizer, windows, [], references={"parent": parent}, context=Context()).metrics
            runtime.close()
            parent.close()
            say(f"{made.title} by {made.by}: perplexity {made.figures['perplexity']:.3f}, KL {made.figures['kl_to_parent']:.2g}")
        for title in dict.fromkeys(made.title for made in self.made):
            row = [made for made in self.made if made.title == title]
            runtimes = [open_runtime(made.path, threads=self.threads) for made in row]
            for _ in range(1 + TURNS):
                for made, runtime in zip(row, runtimes, strict=True):
                    made.speeds.append(tokens_per_second(runtime, windows[0, :PROMPT].tolist()))
            for made, runtime in zip(row, runtimes, strict=True):
                del made.speeds[0]  # warms up
                runtime.close()

    def _make(self, title: str, by: str, checkpoint: Path, commands: Callable[[Path], list[list[str]]]) -> None:
        out = self.folder / f"{len(self.made)}"
        out.mkdir()
        started = time.perf_counter()
        for command in commands(out):
            run(command, self.threads)
        self.made.append(Made(title, by, out, checkpoint, time.perf_counter() - started))
        say(f"{title} by {by}: {self.made[-1].seconds:.1f} s, {self.made[-1].megabytes:.3f} MB")

    def _llama_cpp(self, checkpoint: Path, out: Path, type: str) -> list[list[str]]:
        floating = (out if type == "f16" else self.folder) / "model.gguf"
        convert = script("run_converter", official_converter(), checkpoint, floating, self.pre)
        if type == "f16":
            return [convert]
        number = int(gguf.LlamaFileType[f"MOSTLY_{type.upper()}"])
        return [convert, script("run_quantizer", floating, out / "model.gguf", number, self.threads)]


def script(name: str, *arguments: Any) -> list[str]:
    return [sys.executable, str(SCRIPTS / f"{name}.py"), *map(str, arguments)]


def run(command: list[str], threads: int) -> None:
    """Raises RuntimeError with the end of what it printed where it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed (exit code {done.returncode}):\n{done.stdout[-4000:]}")


def tokens_per_second(runtime: Runtime, prompt: list[int]) -> float:
    return (NEW_TOKENS - 1) / generate(runtime, prompt, NEW_TOKENS).decode_seconds


def render(bench: Bench, base: float) -> str:
    rows = []
    for made in bench.made:
        first = next(other for other in bench.made if other.title == made.title)
        speed, ours = statistics.median(made.speeds), statistics.median(first.speeds)
        rows.append(
            [made.title, made.by, f"{made.megabytes:.3f}", f"{made.figures['perplexity']:.3f}", f"{made.figures['kl_to_parent']:.2g}",
             f"{speed:,.0f}", "" if made is first else f"{ours / speed:.2f}", f"{made.seconds:.1f}"]
        )  # fmt: skip
    headings = ["artifact", "by", "MB", "perplexity", "KL to its checkpoint", "decode t/s", "ours / theirs", "export s"]
    table = page.markdown(headings, ["---", "---", *["---:"] * 6], rows)
    count, length = bench.subject.scored.shape
    return f"""### {bench.subject.title[0].upper()}{bench.subject.title[1:]}

Written by `make bench-export` on {machine()}, {bench.threads} threads. Perplexity {base:.3f} in transformers; {count} windows of {length} tokens. Embedding \
and head are float16 in every GGUF file and float32 in every GenAI package. Speed: median of {TURNS} turns of {NEW_TOKENS} tokens after {PROMPT}, both sides by turns in one \
process. Export seconds are of whole processes, imports included; ours include proving the tokenizer. llama.cpp's converter knows no vocabulary of one's own: it was told \
the pre-tokenizer's name (`{bench.pre}`), which it does not find by itself.

{table}"""


def say(line: str) -> None:
    print(line, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bench", type=Path, help="directory with llama-6m/ and text/; without it the reference model is measured")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--types", default=",".join(GGUF_TYPES), help="GGUF types; other than the default is printed, not written")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    subject = bench_subject(options.bench.resolve(), 1) if options.bench else reference_subject(1)
    with tempfile.TemporaryDirectory(prefix="edgepress-bench-") as folder:
        bench = Bench(Path(folder), subject, options.threads)
        gptq = Path(folder) / "gptq"
        quantize_gptq(subject.checkpoint, gptq, GPTQSettings(bits=4, group_size=32, symmetric=True), subject.draws[0], context=Context())
        for type in options.types.split(","):
            bench.gguf(f"GGUF {type}", subject.checkpoint, ours=type, theirs=type)
        bench.gguf("GGUF q4_0 of GPTQ 4-bit g32", gptq, ours="carry", theirs="q4_0")
        bench.genai("GenAI int4", subject.checkpoint)
        bench.genai("GenAI int4 of GPTQ 4-bit g32", gptq)
        bench.measure()
        base = TransformersRuntime(subject.checkpoint, threads=options.threads)
        found = evaluate_quality(base, load_tokenizer(subject.checkpoint), subject.scored, [], references={}, context=Context())
        body = render(bench, found.metrics["perplexity"])
    if options.types == parser.get_default("types"):
        page.rewrite(f"export of {subject.title}", body)
    say(body)


if __name__ == "__main__":
    main()
