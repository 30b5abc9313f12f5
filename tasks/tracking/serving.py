"""An artifact as a model that MLflow opens (`mlflow.pyfunc`, `mlflow models serve`), in the artifact's own runtime.

MLflow finds this module by its name, so edgepress must be installed where the model is opened. Imports no runtime until then.
"""

import math
import os
import threading
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from compression.errors import EdgepressError, Incompatible
from compression.evaluation.generation import sampler, stream
from compression.evaluation.text import stream_text
from export.runtimes import open_runtime, open_text

FOLDER = "artifact"  # of the artifact's files within the model
PARAMETERS: dict[str, tuple[str, Any]] = {  # MLflow's type and the default
    "max_new_tokens": ("long", 64),
    "temperature": ("double", 0.0),
    "top_p": ("double", 1.0),
    "seed": ("long", 0),
    "chat": ("boolean", False),
}


class EdgeModel:
    """Continues prompts, one after another."""

    def __init__(self, artifact: Path):
        self._runtime = open_runtime(artifact, threads=os.cpu_count() or 1)
        self._text = open_text(artifact, self._runtime)
        self._turn = threading.Lock()  # a runtime has one state

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> Any:
        """Continue prompts.

        Args:
            model_input: A table with the column `prompt`.
            params: Values of PARAMETERS; None stands for the default.

        Returns:
            A table with the column `text`: the continuations.

        Raises:
            EdgepressError: A parameter is out of bounds.
            Incompatible: A prompt leaves no room in the model's context.
        """
        import pandas

        chosen = _chosen(params or {})
        with self._turn:
            texts = [self._continue(prompt, chosen) for prompt in model_input["prompt"]]
        return pandas.DataFrame({"text": texts})

    def _continue(self, prompt: str, chosen: dict[str, Any]) -> str:
        if not isinstance(prompt, str):
            raise EdgepressError(f"a prompt is one text, not {prompt!r}; give a row for each", key="prompt")
        choose = sampler(chosen["temperature"], chosen["top_p"], chosen["seed"])
        tokens = self._text.encode_chat(prompt) if chosen["chat"] else self._text.encode(prompt)
        tokens = tokens or sorted(self._text.ends)[:1]  # nothing at all: what follows a text that ended
        room = self._runtime.max_length - len(tokens)
        if room < 1:
            raise Incompatible(f"the prompt's {len(tokens)} tokens leave no room in the model's {self._runtime.max_length}", key="prompt")
        count = min(chosen["max_new_tokens"], room)
        return "".join(stream_text(self._text, tokens, stream(self._runtime, tokens, count, choose)))


def _chosen(params: Mapping[str, Any]) -> dict[str, Any]:
    """A value for each of PARAMETERS. Raises EdgepressError for a wrong type or a value out of bounds; the sampler checks the rest."""
    chosen = {name: default if params.get(name) is None else params[name] for name, (_, default) in PARAMETERS.items()}
    for name, least in (("max_new_tokens", 1), ("seed", 0)):
        if not isinstance(chosen[name], Integral) or chosen[name] < least:
            raise EdgepressError(f"{name} {chosen[name]!r} must be a whole number, {least} or more", key=name)
    for name in ("temperature", "top_p"):
        if not isinstance(chosen[name], Real) or not math.isfinite(chosen[name]):
            raise EdgepressError(f"{name} {chosen[name]!r} must be a number", key=name)
    return chosen


def _load_pyfunc(path: str) -> EdgeModel:
    """Open a model; MLflow calls this with its directory."""
    return EdgeModel(Path(path) / FOLDER)
