"""Commands that take a checkpoint or an artifact: generate, bench, inspect. The file of the same name does the work."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import psutil
import typer
from rich.console import Console

from compression.errors import EdgepressError
from flows.cli.options import terminal

model_app = typer.Typer()
Model = Annotated[Path, typer.Argument(help="A directory (or its link in outputs/): a checkpoint or an artifact; or a GGUF file.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of every computation; default: the processor's cores.")]


@model_app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue; `-` reads the standard input.")],
    new: Annotated[int, typer.Option("--new", "-n", min=1, help="Tokens to generate at most.")] = 160,
    temperature: Annotated[float, typer.Option("--temp", help="Temperature of sampling; 0 takes the most likely token.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Sample from the most likely tokens that together have this probability.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Seed of sampling: the same seed gives the same text.")] = 0,
    threads: Threads = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
) -> None:
    """Stream text from any artifact or checkpoint, and print timings to the standard error.

    Example: `edgepress generate outputs/demo/gguf-gptq -p "The lamp is" -n 160 --temp 0.7 --threads 6`
    """
    from flows.cli.generate import generate_text

    text = _decode(sys.stdin.buffer.read() if prompt == "-" else os.fsencode(prompt))
    if not generate_text(
        model, text, new_tokens=new, temperature=temperature, top_p=top_p, seed=seed, threads=threads or _cores(), chat=chat
    ):
        raise typer.Exit(130)


@model_app.command()
def bench(
    models: Annotated[list[Path], typer.Argument(help="Checkpoints, artifacts, GGUF files: compared with each other.")],
    prompt: Annotated[str, typer.Option("--prompt", help="Lengths of the prompt in tokens.")] = "32,128",
    new: Annotated[int, typer.Option("--new", "-n", min=2, help="Tokens to generate.")] = 64,
    threads: Threads = None,
    repeats: Annotated[int, typer.Option(min=1, help="Measured generations, after a warm-up.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure tokens/s, time to first token, load time and memory of artifacts and checkpoints, each in a process of its own.

    Example: `edgepress bench outputs/demo/gguf-gptq outputs/demo/onnx --prompt 32,128 --new 64 --threads 1`
    """
    from flows.cli.bench import bench_document, bench_table, measure_rows, parse_lengths, remarks

    cores = threads or _cores()
    with Console(stderr=True).status("starting") as status:
        lengths = parse_lengths(prompt)
        rows = list(measure_rows(models, lengths, new_tokens=new, repeats=repeats, threads=cores, on_start=status.update))
    if as_json:
        print(json.dumps(bench_document(rows, threads=cores, repeats=repeats), indent=2))
    else:
        console = terminal()
        console.print(bench_table(rows, threads=cores, repeats=repeats))
        for remark in remarks(rows):
            console.print(remark, markup=False, highlight=False, soft_wrap=True)
    if any(row.failed for row in rows):
        raise typer.Exit(1)


@model_app.command()
def inspect(
    model: Model,
    verify: Annotated[bool, typer.Option(help="Hash the files and compare with the sha256 that edgepress recorded.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a checkpoint or artifact is, where it comes from, and whether its files are intact; exit code 1 where they are not.

    Example: `edgepress inspect outputs/demo/gguf-gptq`
    """
    from flows.cli.inspect import altered_files, inspect_model, print_inspection

    inspection = inspect_model(model, verify=verify)
    if as_json:
        print(json.dumps(inspection, indent=2))
    else:
        print_inspection(inspection, terminal())
    if altered_files(inspection):
        raise typer.Exit(1)


def _decode(prompt: bytes) -> str:
    """Raises EdgepressError for a prompt that is not UTF-8."""
    try:
        return prompt.decode()
    except UnicodeDecodeError as error:
        raise EdgepressError(f"the prompt is not UTF-8 ({error}); iconv translates it") from None


def _cores() -> int:
    """Count the cores that this process may use; two threads of one core count once."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(usable, psutil.cpu_count(logical=False) or usable))
