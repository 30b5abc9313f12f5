"""Which runtime opens a directory, and opening it. Imports no runtime until one is asked for."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from compression.errors import MissingExtra, UnusableModel
from compression.evaluation.runtime import Runtime
from compression.evaluation.text import Text


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
    "openvino": Package("openvino", "openvino", "export.runtimes.openvino_runtime", "OpenvinoRuntime"),
    "executorch": Package("executorch", "executorch", "export.runtimes.executorch_runtime", "ExecutorchRuntime"),
    "llama.cpp": Package("llama-cpp-python", "llamacpp", "export.runtimes.llamacpp", "LlamaCppRuntime"),
}


def installed_runtimes() -> dict[str, str | None]:
    """Version of each runtime's package, None where it is not installed."""
    return {name: _version(package.distribution) for name, package in PACKAGES.items()}


def runtime_name(path: Path) -> str:
    """The runtime that a checkpoint or artifact directory is for, told from its files.

    A GGUF file may stand alone. Raises UnusableModel where none fits.
    """
    if not path.exists():
        raise UnusableModel(f"there is no file or directory {path}", key="model")
    if path.suffix == ".gguf" or any(path.glob("*.gguf")):
        return "llama.cpp"
    if (path / "genai_config.json").is_file():
        return "onnxruntime-genai"
    if (path / "model.onnx").is_file():
        return "onnxruntime"
    if (path / "model.xml").is_file():
        return "openvino"
    if (path / "model.pte").is_file():
        return "executorch"
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return "transformers"
    raise UnusableModel(
        f"{path} is neither a checkpoint (config.json and safetensors) nor an artifact "
        "(*.gguf, genai_config.json, model.onnx, model.xml or model.pte)",
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


def open_text(path: Path, runtime: Runtime) -> Text:
    """The tokenizer of an open model: llama.cpp's own, else the Hugging Face one beside the model.

    Raises UnusableModel where there is none.
    """
    if runtime.name == "llama.cpp":
        from export.runtimes.llamacpp import LlamaCppRuntime
        from export.runtimes.llamacpp_text import LlamaCppText

        assert isinstance(runtime, LlamaCppRuntime)
        return LlamaCppText(runtime)
    from export.runtimes.texts import HuggingFaceText

    return HuggingFaceText(path)


def import_runtime(name: str) -> Callable[..., Runtime]:
    """Import a runtime's library and return our class for it. Raises MissingExtra where the library is not installed."""
    check_installed(name)
    package = PACKAGES[name]
    return getattr(importlib.import_module(package.module), package.name)


def check_installed(name: str) -> None:
    """Raises MissingExtra where a runtime's library is not installed."""
    package = PACKAGES[name]
    if _version(package.distribution) is None:
        raise MissingExtra(package.distribution, package.extra, f"the runtime {name}")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
