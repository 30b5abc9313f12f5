"""One of our methods on one checkpoint: the whole call is timed, reading and writing the checkpoint included."""

from pathlib import Path

import torch
from child import answered, read_job, read_windows
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

from compression.context import Context
from compression.pruning import UnstructuredSettings, prune_unstructured
from compression.quantization.awq import quantize_awq
from compression.quantization.gptq import quantize_gptq
from compression.quantization.rtn import quantize_rtn
from compression.quantization.settings import AWQSettings, GPTQSettings, RTNSettings

job = read_job()
torch.set_num_threads(job["threads"])
windows = torch.tensor(read_windows(job))
checkpoint, out, context = Path(job["checkpoint"]), Path(job["out"]), Context()
MODEL_FOR_CAUSAL_LM_MAPPING[type(AutoConfig.from_pretrained(checkpoint))]  # the last import, that of the architecture
grid = {"bits": job["bits"], "group_size": job["group_size"]}

with answered(job, "torch", "transformers"):
    match job["method"]:
        case "gptq":
            quantize_gptq(checkpoint, out, GPTQSettings(**grid, symmetric=job["symmetric"]), windows, context=context)
        case "awq":
            quantize_awq(checkpoint, out, AWQSettings(**grid), windows, context=context)
        case "rtn":
            quantize_rtn(checkpoint, out, RTNSettings(**grid, symmetric=job["symmetric"]), context=context)
        case method:
            prune_unstructured(checkpoint, out, UnstructuredSettings(method=method, sparsity=job["sparsity"]), windows, context=context)
