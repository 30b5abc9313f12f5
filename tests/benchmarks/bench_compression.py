"""Our methods beside GPTQModel's and llm-compressor's: `python -m tests.benchmarks.bench_compression`, one process at a time.

Every method runs in a process of its own, in its implementation's environment, on the same calibration windows. What it saves is scored
by one scorer, ours, through our own loader. A complete run writes its part of docs/benchmarks.md, any other prints it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from compression.context import Context
from compression.evaluation.scorers import perplexity
from compression.evaluation.transformers_runtime import TransformersRuntime
from tasks.measurement.measure import machine_fingerprint
from tests.benchmarks import page
from tests.benchmarks.compression.environments import PINS, python_of
from tests.benchmarks.compression.protocol import METHODS, OURS, REFERENCE, Method, Subject, bench_subject, reference_subject
from tests.benchmarks.compression.tables import Measured, Results, against_table, results_table, size_table

SCRIPTS = Path(__file__).with_name("compression")
DRAWS = 3
SIZE_WINDOWS, SIZE_LENGTH = 32, 256
SIZE_CONFIG: dict[str, Any] = {
    "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "max_position_embeddings": 32768, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
SETTINGS = """\
Groups, symmetry and calibration windows are the same for all; dampening is 1%, batches are of 16 windows (ours: 4,096 tokens), weights \
float32. Ours: its defaults (GPTQ with static act-order and error-minimizing clip, AWQ with clip search). GPTQModel: its defaults (GPTQ \
act-group-aware, without act-order; AWQ with clip search, in float16, since it takes no float32), AWQ with the backend AWQ_TORCH, two CPU \
workers, nothing offloaded to disk. llm-compressor: its defaults (GPTQ with static act-order; AWQ duo scaling, 20 grid points), AWQ with \
pin_memory taken out; the head is kept out by a pattern, since its pruning does not know it by its name and prunes the tied embedding. \
Seconds are of the call itself, without start and imports: ours read and write the checkpoint inside it, the peers' load and save outside. \
Memory is the peak of the process until the call returns."""


class Bench:
    """Runs jobs, each in a process of its own, in a folder that it empties behind itself."""

    def __init__(self, folder: Path, threads: int):
        self._folder, self._threads = folder, threads

    def run(self, script: str, *, python: Path = Path(sys.executable), windows: torch.Tensor | None = None, **job: Any) -> dict[str, Any]:
        """The answer of a script. Raises RuntimeError with the end of what it printed where it fails."""
        answer, printed, given = (self._folder / name for name in ("answer.json", "printed.txt", "windows.json"))
        answer.unlink(missing_ok=True)
        if windows is not None:
            given.write_text(json.dumps(windows.tolist()))
        content = {**job, "windows": str(given), "threads": self._threads, "answer": str(answer)}
        environment = os.environ | {"OMP_NUM_THREADS": str(self._threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        with printed.open("w") as output:
            done = subprocess.run(
                [python, SCRIPTS / f"{script}.py"],
                input=json.dumps(content, default=str), text=True, stdout=output, stderr=subprocess.STDOUT, env=environment,
                cwd=self._folder, check=False,  # GPTQModel leaves logs where it runs
            )  # fmt: skip
        if done.returncode or not answer.is_file():
            raise RuntimeError(f"{script} failed (exit code {done.returncode}) on {job}:\n{printed.read_text(errors='replace')[-4000:]}")
        return json.loads(answer.read_text())

    def score(self, checkpoint: Path, windows: torch.Tensor) -> float:
        """Perplexity, in this process."""
        runtime = TransformersRuntime(checkpoint, threads=self._threads)
        scored = perplexity(runtime, windows, Context())
        runtime.close()
        return scored

    def measure(self, method: Method, by: str, python: Path, subject: Subject) -> tuple[Measured, dict[str, str]]:
        """A method on every calibration draw, or once where calibration does not matter; and the versions that ran."""
        measured, versions = Measured(), {}
        for windows in subject.draws if method.calibrated else subject.draws[:1]:
            with tempfile.TemporaryDirectory(dir=self._folder) as place:
                out = Path(place) / "out"
                answer = self.run(
                    f"run_{by}", python=python, windows=windows, checkpoint=subject.checkpoint, out=out, method=method.method,
                    bits=method.bits, group_size=method.group_size, symmetric=method.symmetric, sparsity=method.sparsity,
                )  # fmt: skip
                measured.seconds.append(answer["seconds"])
                measured.peak_rss_mb.append(answer["peak_rss_mb"])
                measured.perplexity.append(self.score(out, subject.scored))
            versions = answer["versions"]
            say(
                f"{method.title} by {by}: {answer['seconds']:.2f} s, perplexity {measured.perplexity[-1]:.3f}, {answer['peak_rss_mb']:.0f} MB"
            )
        return measured, versions


def compare(bench: Bench, subject: Subject, methods: Iterable[Method], pythons: dict[str, Path]) -> str:
    """The tables of one model."""
    base = bench.score(subject.checkpoint, subject.scored)
    say(f"{subject.title}: perplexity {base:.3f}")
    floor = bench.run("floor", checkpoint=subject.checkpoint, windows=subject.draws[0])
    results: dict[Method, dict[str, Measured]] = {}
    versions: dict[str, dict[str, str]] = {}
    for method in methods:
        results[method] = {}
        for by in (OURS, *(peer for peer in method.peers if peer in pythons)):
            results[method][by], versions[by] = bench.measure(method, by, pythons.get(by, Path(sys.executable)), subject)
    return render(subject, base, floor, versions, results)


def render(subject: Subject, base: float, floor: dict[str, float], versions: dict[str, dict[str, str]], results: Results) -> str:
    ran = "; ".join(f"{by} with {', '.join(f'{name} {version}' for name, version in found.items())}" for by, found in versions.items())
    count, length = subject.draws[0].shape
    return f"""### {subject.title[0].upper()}{subject.title[1:]}

Written by `make bench-compression` on {machine()}. Perplexity {base:.3f} before; {len(subject.scored)} windows of {subject.scored.shape[1]} \
tokens, all positions but the first of each. {len(subject.draws)} calibration draws of {count} windows of {length} tokens: perplexity is their mean, seconds \
their median, memory their maximum. {ran[0].upper()}{ran[1:]}.

Floor {floor["seconds"]:.2f} s: two forward passes of the calibration tokens {floor["forward_seconds"]:.2f} s, Hessian products \
{floor["hessian_seconds"]:.2f} s at {floor["gflops"]:.0f} GFLOP/s.

{results_table(results, floor["seconds"])}
Ours against the better peer in each respect:

{against_table(results)}
{SETTINGS}
"""


def at_size(bench: Bench, folder: Path) -> str:
    """Time and memory of ours on half a billion parameters."""
    model = folder / "model"
    parameters = bench.run("build_at_size", checkpoint=REFERENCE, out=model, config=SIZE_CONFIG)["parameters"]
    windows = torch.randint(2, SIZE_CONFIG["vocab_size"], (SIZE_WINDOWS, SIZE_LENGTH), generator=torch.Generator().manual_seed(0))
    rows = []
    for method in (m for m in METHODS if m.title in ("GPTQ 4-bit g128", "AWQ 4-bit g128", "SparseGPT 50%")):
        with tempfile.TemporaryDirectory(dir=folder) as place:
            answer = bench.run(
                f"run_{OURS}", windows=windows, checkpoint=model, out=Path(place) / "out", method=method.method, bits=method.bits,
                group_size=method.group_size, symmetric=method.symmetric, sparsity=method.sparsity,
            )  # fmt: skip
        rows.append((method.title, answer["seconds"], answer["peak_rss_mb"]))
        say(f"{method.title} at size: {answer['seconds']:.1f} s, {answer['peak_rss_mb']:.0f} MB")
    return f"""### At size

Written by `make bench-compression` on {machine()}. A random Qwen2-shaped model of {parameters / 1e6:.0f} million parameters in bfloat16 (24 blocks, hidden \
896, intermediate 4,864, vocabulary 151,936, tied), {SIZE_WINDOWS} windows of {SIZE_LENGTH} random tokens, ours, float32 on the CPU.

{size_table(rows, parameters)}"""


def machine() -> str:
    found = machine_fingerprint()
    return f"{time.strftime('%Y-%m-%d', time.gmtime())}: {found['processor']}, {found['cores']} cores, {found['memory_gib']} GiB of memory"


def say(line: str) -> None:
    print(line, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bench", type=Path, help="directory with llama-6m/ and text/; without it the reference model is measured")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--draws", type=int, default=DRAWS, help="calibration draws")
    parser.add_argument("--only", default="", help="methods, by comma: gptq,awq,rtn,sparsegpt,wanda,magnitude")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--at-size", action="store_true", help="measure ours on half a billion parameters instead")
    options = parser.parse_args(arguments)
    known = {method.method for method in METHODS}
    only = set(filter(None, options.only.split(","))) or known
    if unknown := only - known:
        parser.error(f"there is no method {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")

    with tempfile.TemporaryDirectory(prefix="edgepress-bench-") as place:
        bench = Bench(Path(place), options.threads)
        if options.at_size:
            part, body, complete = "compression at size", at_size(bench, Path(place)), True
        else:
            pythons = {peer: python_of(peer) for peer in PINS} if options.peers else {}
            subject = bench_subject(options.bench.resolve(), options.draws) if options.bench else reference_subject(options.draws)
            warm_up(bench, pythons, subject)
            body = compare(bench, subject, [method for method in METHODS if method.method in only], pythons)
            part, complete = f"compression of {subject.title}", options.peers and options.draws == DRAWS and only == known
    if complete:
        page.rewrite(part, body)
    say(body)


def warm_up(bench: Bench, pythons: dict[str, Path], subject: Subject) -> None:
    """One small job by each peer that nobody measures: at its first use GPTQModel compiles a library of its own, for half a minute."""
    for peer, python in pythons.items():
        with tempfile.TemporaryDirectory() as place:
            bench.run(
                f"run_{peer}", python=python, windows=subject.draws[0][:2], checkpoint=subject.checkpoint, out=Path(place) / "out", method="gptq",
                bits=4, group_size=32, symmetric=True, sparsity=None,
            )  # fmt: skip


if __name__ == "__main__":
    main()
