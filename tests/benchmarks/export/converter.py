"""llama.cpp's own converter, from the source package of llama-cpp-python: for comparing only, never part of edgepress."""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

from tests.benchmarks.compression.environments import CACHE

FOLDER = CACHE / "llama.cpp"
PARTS = ("convert_hf_to_gguf.py", "conversion", "gguf-py", "LICENSE")


def official_converter() -> Path:
    """The directory with convert_hf_to_gguf.py of the installed llama-cpp-python's version, unpacked where it is missing.

    Raises CalledProcessError where the package index has it not.
    """
    if (FOLDER / "convert_hf_to_gguf.py").is_file():
        return FOLDER
    with tempfile.TemporaryDirectory() as folder:
        wanted = f"llama-cpp-python=={version('llama-cpp-python')}"
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation", "--no-binary", ":all:", wanted]
        subprocess.run([*download, "--dest", folder], check=True)
        (package,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(package) as archive:
            archive.extractall(folder, filter="data")
        (source,) = Path(folder).glob("*/vendor/llama.cpp")
        FOLDER.mkdir(parents=True, exist_ok=True)
        # which it imports before it knows that the tokenizer is another one
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--target", FOLDER / "packages", "sentencepiece"], check=True)
        for part in PARTS[::-1]:  # the script last: it tells that all is there
            copy = shutil.copytree if (source / part).is_dir() else shutil.copy
            copy(source / part, FOLDER / part)
    return FOLDER
