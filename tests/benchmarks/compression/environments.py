"""The peers' environments, apart from ours and from each other: their pins exclude each other."""

import subprocess
import sys
from pathlib import Path

from tests.benchmarks.compression.protocol import GPTQMODEL, LLMCOMPRESSOR

CACHE = Path.home() / ".cache" / "edgepress-bench"
# torch goes first and pinned: a looser request pulls several GB of CUDA packages.
PINS = {
    GPTQMODEL: ("torch==2.13.0", "gptqmodel==7.6.0", "numpy==2.2.6", "optimum==2.3.0", "transformers==5.23.0"),
    LLMCOMPRESSOR: ("torch==2.13.0", "llmcompressor==0.14.0.1", "compressed-tensors==0.19.0", "transformers==5.17.0"),
}


def python_of(peer: str) -> Path:
    """The interpreter of a peer's environment, which is built where it is missing or holds other pins. Raises CalledProcessError."""
    folder = CACHE / peer
    python, ready, wanted = folder / "bin" / "python", folder / ".ready", "\n".join(PINS[peer])
    if not ready.is_file() or ready.read_text() != wanted:
        print(f"building the environment of {peer} in {folder}", flush=True)
        if not python.is_file():
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        for pins in (PINS[peer][:1], PINS[peer]):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *pins], check=True)
        ready.write_text(wanted)
    return python
