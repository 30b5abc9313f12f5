"""Which runtime opens a directory, and opening it. Imports no runtime until one is asked for."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from compression.errors import MissingExtra, UnusableModel
from compression.evaluation.runtime import Runtime


@dataclass(frozen=True)
class Package:
    """Where a runtime comes from: its distribution, the extra of edgepress that installs it, and our class for it."""

    distribution: str
    extra: str
    module: str
    name: str


PACKAGES = {
    "transformers": Package("transformers", "", "compression.evaluation.transformers_runtime", "TransformersRuntime"),
    "onnxruntime": Package("onnxruntime", "onnx", "export.runtimes.onnx_runtime", "OnnxRuntime"),
    "onnxruntime-genai": Package("onnxruntime-genai", "genai", "export.runtimes.genai_runtime", "GenaiRuntime"),
    "llama.cpp": Package("llama-cpp-python", "llamacpp", "export.runtimes.llamacpp", "LlamaCppRuntime"),
}


def installed_runtimes() -> dict[str, str | None]:
    """Version of each runtime's package, None where it is not installed."""
    return {name: _version(package.distribution) for name, package in PACKAGES.items()}


def runtime_name(path: Path) -> str:
    """The runtime that a checkpoint or artifact directory is for, told from its files.

    Raises UnusableModel where none fits.
    """
    if any(path.glob("*.gguf")):
        return "llama.cpp"
    if (path / "genai_config.json").is_file():
        return "onnxruntime-genai"
    if (path / "model.onnx").is_file():
        return "onnxruntime"
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return "transformers"
    raise UnusableModel(
        f"{path} is neither a checkpoint (config.json and safetensors) nor an artifact (*.gguf, genai_config.json or model.onnx)",
        key="model",
    )


def open_runtime(path: Path, *, device: str = "cpu", threads: int) -> Runtime:
    """Load a checkpoint or artifact in the runtime it is for.

    device   of a checkpoint; artifacts are measured on the CPU they are meant for
    threads  that one operator may use
    Raises UnusableModel for a directory of no runtime, MissingExtra where the runtime's package is not installed.
    """
    name = runtime_name(path)
    runtime = import_runtime(name)
    return runtime(path, device=device, threads=threads) if name == "transformers" else runtime(path, threads=threads)


def import_runtime(name: str) -> Callable[..., Runtime]:
    """Import a runtime's library and return our class for it. Raises MissingExtra where the library is not installed."""
    package = PACKAGES[name]
    if _version(package.distribution) is None:
        raise MissingExtra(package.distribution, package.extra, f"the runtime {name}")
    return getattr(importlib.import_module(package.module), package.name)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
