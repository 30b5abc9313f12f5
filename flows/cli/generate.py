"""`edgepress generate`: text from any artifact or checkpoint, printed as it comes."""

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
    """Seconds that the runtime took: for loading, for the first token (with the prompt before it), for each further one."""

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

    Returns False where Ctrl-C ended it. Raises EdgepressError for settings, a directory or a prompt that cannot work.
    """
    choose = sampler(temperature, top_p, seed)
    import_runtime(runtime_name(path))  # whose time is not the model's
    _no_progress_bars()
    timings = Timings()
    begin = time.perf_counter()
    with closing(open_runtime(path, threads=threads)) as runtime:
        timings.load = time.perf_counter() - begin
        text = open_text(path, runtime)
        tokens = text.encode_chat(prompt) if chat else text.encode(prompt)
        if not tokens:
            tokens = sorted(text.ends)[:1]  # nothing at all: what follows a text that ended
        generated = stream(runtime, tokens, new_tokens, choose)
        try:
            print("" if chat else prompt, end="", flush=True)
            for piece in stream_text(text, tokens, _timed(generated, timings)):
                print(piece, end="", flush=True)
            print(flush=True)
            ended = "end of text" if len(timings.tokens) < new_tokens else "as many as asked"
        except KeyboardInterrupt:
            print(flush=True)
            ended = "interrupted"
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more when it flushes at exit
            ended = "nobody reads on"
        print(timings.line(runtime, tokens, ended), file=sys.stderr)
    return ended != "interrupted"


def _timed(tokens: Iterator[int], timings: Timings) -> Iterator[int]:
    """The same tokens, while the clock counts what they took but not what is done with them."""
    while True:
        begin = time.perf_counter()
        token = next(tokens, None)
        if token is None:
            return
        timings.tokens.append(time.perf_counter() - begin)
        yield token


def _no_progress_bars() -> None:
    """Of transformers, where it is loaded: the terminal is for the text."""
    if "transformers" in sys.modules:
        from transformers.utils import logging

        logging.disable_progress_bar()
