"""Which runtime opens a directory, and opening it. Imports no runtime until one is asked for."""

from importlib import metadata
from pathlib import Path

from compression.errors import MissingExtra, UnusableModel
from compression.evaluation.runtime import Runtime

# runtime -> (distribution on PyPI, extra of edgepress that installs it)
PACKAGES = {
    "transformers": ("transformers", ""),
    "onnxruntime": ("onnxruntime", "onnx"),
    "onnxruntime-genai": ("onnxruntime-genai", "genai"),
    "llama.cpp": ("llama-cpp-python", "llamacpp"),
}


def installed_runtimes() -> dict[str, str | None]:
    """Version of each runtime's package, None where it is not installed."""
    return {name: _version(package) for name, (package, _) in PACKAGES.items()}


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
    package, extra = PACKAGES[name]
    if _version(package) is None:
        raise MissingExtra(package, extra, f"opening {path} in {name}")
    if name == "llama.cpp":
        from export.runtimes.llamacpp import LlamaCppRuntime

        return LlamaCppRuntime(path, threads=threads)
    if name == "onnxruntime-genai":
        from export.runtimes.genai_runtime import GenaiRuntime

        return GenaiRuntime(path, threads=threads)
    if name == "onnxruntime":
        from export.runtimes.onnx_runtime import OnnxRuntime

        return OnnxRuntime(path, threads=threads)
    from compression.evaluation.transformers_runtime import TransformersRuntime

    return TransformersRuntime(path, device=device, threads=threads)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
