"""A method of llm-compressor on one checkpoint, in its own environment: `oneshot` is timed, loading and saving are not.

Saves the dense weights that its quantized layers stand for, in float32.
"""

import shutil
from pathlib import Path

import torch
from child import answered, read_job, read_windows
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

WINDOWS_PER_BATCH = 16
IGNORED = ["re:.*lm_head"]  # not "lm_head": pruning calls it "lm_head.", and would prune the tied embedding with it

job = read_job()
torch.set_num_threads(job["threads"])
source, out = Path(job["checkpoint"]), Path(job["out"])
IntermediatesCache.pin_memory = lambda *_: None  # AWQ calls it without a GPU too, where torch refuses

weights = QuantizationArgs(
    num_bits=job["bits"] or 16, type="int", symmetric=job["symmetric"], strategy="group", group_size=job["group_size"] or 128
)
groups = {"config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}, "ignore": IGNORED}
recipes = {
    "gptq": lambda: [GPTQModifier(**groups, dampening_frac=0.01)],
    "awq": lambda: [AWQModifier(), QuantizationModifier(**groups)],
    "rtn": lambda: [QuantizationModifier(**groups)],
    "sparsegpt": lambda: [SparseGPTModifier(sparsity=job["sparsity"], ignore=IGNORED)],
    "wanda": lambda: [WandaPruningModifier(sparsity=job["sparsity"], ignore=IGNORED)],
}
recipe = recipes[job["method"]]()
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(source)
windows = read_windows(job)
rows = Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(ids) for ids in windows]})
calibration = {
    "dataset": rows, "num_calibration_samples": len(windows), "max_seq_length": len(windows[0]), "batch_size": WINDOWS_PER_BATCH,
    "shuffle_calibration_samples": False,
}  # fmt: skip

with answered(job, "llmcompressor", "compressed-tensors", "torch", "transformers"):
    oneshot(model=model, tokenizer=tokenizer, recipe=recipe, **({} if job["method"] == "rtn" else calibration))

with torch.no_grad():
    for module in model.modules():
        if scheme := getattr(module, "quantization_scheme", None):
            module.weight.copy_(fake_quantize(module.weight, module.weight_scale, module.weight_zero_point, scheme.weights))
out.mkdir()
for file in source.iterdir():
    if file.suffix == ".json" and not file.name.endswith(".index.json"):
        shutil.copyfile(file, out / file.name)
names = {name for shard in source.glob("*.safetensors") for name in load_file(shard)}
state = model.state_dict()
save_file({name: state[name].contiguous() for name in names}, out / "model.safetensors", metadata={"format": "pt"})
