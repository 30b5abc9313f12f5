"""A recipe on the tiny checkpoint, and the command line as a function."""

import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

DATA = (
    "{text: embedded, questions: embedded, length: 32, train_documents: 40, calibration_windows: 4, evaluation_windows: 4, "
    "evaluation_questions: 8}"
)
STAGES = """\
  pruned: {uses: prune.width, keep: 0.5}
  distilled: {uses: distill, steps: 120, batch_size: 2, save_every: 10}
  gptq: {uses: quantize.gptq, group_size: 32}
  gguf: {uses: export.gguf, type: carry}
  onnx: {uses: export.onnx, needs: distilled}
"""


def recipe(model: Path | str, stages: str = STAGES, rest: str = "", data: str = DATA) -> str:
    return f"model: {model}\ndata: {data}\ndevice: cpu\nthreads: 1\nstages:\n{stages}{rest}"


def edgepress(arguments: Sequence[str], capfd: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Run the console script's function in this process; returns exit code, standard output, standard error."""
    from flows.cli.main import main

    before = signal.getsignal(signal.SIGTERM)
    code: object = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["edgepress", *arguments])
        try:
            main()
        except SystemExit as error:
            code = error.code
        finally:
            signal.signal(signal.SIGTERM, before)
    out, err = capfd.readouterr()
    assert isinstance(code, int | None)
    return code or 0, out, err
