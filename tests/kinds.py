"""Kinds of stages that only tests run, and how a run of the command finds them: as those of any package that was installed."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from compression.checkpoints.checkpoint import Checkpoint
from compression.context import Context
from compression.data import DataSpec
from tasks.stage import Corpus, Inputs, Planned, Stage, Workplace

REPOSITORY = Path(__file__).parents[1]


class Trivial(Stage):
    """Writes a line: what is left of a run of it is orchestration."""

    uses: Literal["test.trivial"] = "test.trivial"
    libraries: ClassVar[tuple[str, ...]] = ()
    number: int = 0
    seconds: float = 0.0
    tally: str | None = None
    after: str | None = None

    def plan(self, parent: Checkpoint, others: Mapping[str, Planned], data: DataSpec) -> Planned:
        return Corpus(size_bytes=10)

    def run(self, inputs: Inputs, place: Workplace, data: DataSpec, context: Context) -> dict[str, float]:
        """Also adds a line to the file `tally`: how often it was computed. Waits for the file `after`."""
        if self.tally:
            with Path(self.tally).open("a") as tally:
                tally.write(f"{os.getpid()}\n")
        time.sleep(self.seconds)
        while self.after and not Path(self.after).exists():
            time.sleep(0.05)
        (place.out / "corpus.jsonl").write_text(f'{{"text": "{self.number}"}}\n')
        return {}


class Trouble(Stage):
    """Does what stages do that go wrong."""

    uses: Literal["test.trouble"] = "test.trouble"
    libraries: ClassVar[tuple[str, ...]] = ()
    sparse: ClassVar[bool] = True
    what: Literal["hang", "hog", "fill", "remove"]

    def plan(self, parent: Checkpoint, others: Mapping[str, Planned], data: DataSpec) -> Planned:
        return Corpus(size_bytes=10)

    def run(self, inputs: Inputs, place: Workplace, data: DataSpec, context: Context) -> dict[str, float]:
        match self.what:
            case "hang":  # with a process of its own, which hangs too
                below = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
                (place.work / "pids").write_text(f"{os.getpid()} {below.pid}")
                time.sleep(600)
            case "hog":
                held = []
                while True:
                    held.append(bytearray(os.urandom(1)) * (64 << 20))
            case "fill":
                with Path("/dev/full").open("wb") as full:
                    full.write(b"x")
            case "remove":
                shutil.rmtree(inputs.parent.parent)
                raise FileNotFoundError(inputs.parent)
        return {}


def installed(folder: Path) -> str:
    """PYTHONPATH of a process that is to find these kinds by their entry points, which are written into `folder`."""
    info = folder / "edgepress_test_kinds-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: edgepress-test-kinds\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[edgepress.stages]\ntrivial = tests.kinds:Trivial\ntrouble = tests.kinds:Trouble\n")
    return os.pathsep.join([str(folder), str(REPOSITORY)])
