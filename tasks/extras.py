"""The optional packages of each extra of edgepress, and whether they are installed. Imports none of them."""

from importlib.util import find_spec

from compression.errors import MissingExtra

EXTRAS: dict[str, dict[str, str]] = {  # extra -> distribution -> module
    "onnx": {"onnx": "onnx", "onnxruntime": "onnxruntime", "onnxscript": "onnxscript"},
    "genai": {"onnxruntime-genai": "onnxruntime_genai", "onnx": "onnx", "onnxruntime": "onnxruntime"},
    "gptqmodel": {"gptqmodel": "gptqmodel"},
    "qlora": {"bitsandbytes": "bitsandbytes"},
    "s3": {"s3fs": "s3fs"},
    "dask": {"distributed": "distributed"},
    "openvino": {"openvino": "openvino"},
    "executorch": {"executorch": "executorch"},
    "harness": {"lm-eval": "lm_eval", "rouge-score": "rouge_score"},
    "energy": {"codecarbon": "codecarbon"},
    "llamacpp": {"gguf": "gguf", "llama-cpp-python": "llama_cpp"},
}

ELSEWHERE = {  # what needs an extra besides the kinds of stages
    "gptqmodel": "quantize.gptq with engine gptqmodel",
    "qlora": "finetune with method qlora",
    "s3": "edgepress store export s3://…",
    "dask": "execution.runner dask",
    "harness": "evaluation.harness and evaluation.summarization",
    "energy": "evaluation.energy, an estimate where there are no counters",
}


def missing(extra: str) -> list[str]:
    """Return the distributions of an extra that are not installed."""
    return [distribution for distribution, module in EXTRAS[extra].items() if find_spec(module) is None]


def require(extra: str, needed_for: str) -> None:
    """Raise MissingExtra for the first package of an extra that is not installed; `needed_for` says what needs it."""
    for distribution in missing(extra):
        raise MissingExtra(distribution, extra, needed_for)
