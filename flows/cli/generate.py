"""`edgepress generate`: stream text from any artifact or checkpoint."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from compression.evaluation.generation import sampler, stream
from compression.evaluation.runtime import Runtime
from compression.evaluation.text import stream_text
from export.runtimes import import_runtime, open_runtime, open_text, runtime_name


@dataclass
class Timings:
    """Seconds of the runtime: for loading, for the first token (with the prompt), for each further token."""

    load: float = 0.0
    tokens: list[float] = field(default_factory=list)

    def line(self, runtime: Runtime, prompt: list[int], ended: str) -> str:
        parts = [f"{runtime.name}: {len(prompt)} prompt tokens"]
        if self.tokens:
            parts += [f"first token after {1000 * self.tokens[0]:.0f} ms", f"{len(self.tokens)} tokens ({ended})"]
        if (seconds := sum(self.tokens[1:])) and runtime.timed:
            parts.append(f"{len(self.tokens[1:]) / seconds:.1f} tokens/s")
        elif not runtime.timed:
            parts.append("tokens/s left out: this layout has no fast kernel here")
        return ", ".join([*parts, f"loaded in {self.load:.2f} s"])


def generate_text(
    path: Path, prompt: str, *, new_tokens: int, temperature: float, top_p: float, seed: int, threads: int, chat: bool
) -> bool:
    """Print the prompt's continuation (in a chat, the answer) to the standard output and one line of timings to the standard error.

    Returns:
        False where Ctrl-C ended it.

    Raises:
        EdgepressError: Settings, directory or prompt cannot work.
    """
    choose = sampler(temperature, top_p, seed)
    import_runtime(runtime_name(path))  # before the clock starts
    _disable_progress_bars()
    timings = Timings()
    start = time.perf_counter()
    with closing(open_runtime(path, threads=threads)) as runtime:
        timings.load = time.perf_counter() - start
        text = open_text(path, runtime)
        tokens = text.encode_chat(prompt) if chat else text.encode(prompt)
        if not tokens:
            tokens = sorted(text.ends)[:1]  # an empty prompt: start after the end of a text
        generated = stream(runtime, tokens, new_tokens, choose)
        try:
            print("" if chat else prompt, end="", flush=True)
            for piece in stream_text(text, tokens, _timed(generated, timings)):
                print(piece, end="", flush=True)
            print(flush=True)
            ended = "end of text" if len(timings.tokens) < new_tokens else "as many as requested"
        except KeyboardInterrupt:
            print(flush=True)
            ended = "interrupted"
        except BrokenPipeError:
            os.dup2(
                os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
            )  # otherwise Python reports the broken pipe again when it flushes at exit
            ended = "output closed"
        print(timings.line(runtime, tokens, ended), file=sys.stderr)
    return ended != "interrupted"


def _timed(tokens: Iterator[int], timings: Timings) -> Iterator[int]:
    """Pass tokens on, and count the time they took but not the time their consumer takes."""
    while True:
        start = time.perf_counter()
        token = next(tokens, None)
        if token is None:
            return
        timings.tokens.append(time.perf_counter() - start)
        yield token


def _disable_progress_bars() -> None:
    """Keep the terminal for the text: transformers, where it is loaded, prints bars."""
    if "transformers" in sys.modules:
        from transformers.utils import logging

        logging.disable_progress_bar()
