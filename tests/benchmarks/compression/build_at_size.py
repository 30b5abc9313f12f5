"""A random Qwen2-shaped model of half a billion parameters, bfloat16: weights that no method can do well on, at a size that shows time and memory."""

import json
from pathlib import Path

import torch
from child import read_job
from transformers import AutoConfig, AutoModelForCausalLM

from compression.checkpoints.loading import copy_tokenizer

job = read_job()
torch.manual_seed(0)
config = AutoConfig.for_model("qwen2", **job["config"])
model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
model.save_pretrained(job["out"])
copy_tokenizer(Path(job["checkpoint"]), Path(job["out"]))
Path(job["answer"]).write_text(json.dumps({"parameters": model.num_parameters()}))
