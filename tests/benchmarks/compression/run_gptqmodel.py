"""A method of GPTQModel on one checkpoint, in its own environment: `quantize` is timed, loading and saving are not."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import torch
from child import answered, read_job, read_windows

# The child of our own engine, which needs nothing else of edgepress.
spec = spec_from_file_location("gptqmodel_child", Path(__file__).resolve().parents[3] / "compression/quantization/gptqmodel_child.py")
assert spec is not None and spec.loader is not None
engine = module_from_spec(spec)
spec.loader.exec_module(engine)

job = read_job()
torch.set_num_threads(job["threads"])
method = job["method"]
settings = {"bits": job["bits"], "group_size": job["group_size"], "sym": job["symmetric"], "offload_to_disk": False}
if method == "gptq":
    settings["damp_percent"] = 0.01
# AWQ takes half precision only: the checkpoint's own. The others are faster on a CPU in float32.
model = engine.load(
    job["checkpoint"], config=f"{method.upper()}Config", settings=settings, dtype="float16" if method == "awq" else "float32", device="cpu"
)
windows = [] if method == "rtn" else read_windows(job)
with answered(job, "gptqmodel", "torch", "transformers"):
    engine.quantize(model, windows, lambda _: None)
model.save(job["out"])
