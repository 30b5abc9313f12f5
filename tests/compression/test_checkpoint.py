"""What is told from a directory without loading it, against transformers."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compression.checkpoints.checkpoint import open_checkpoint
from compression.checkpoints.families import FAMILIES
from compression.checkpoints.loading import load_model
from compression.checkpoints.shards import read_tensors
from compression.errors import UnusableModel
from tests.tiny import tiny_checkpoint


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
@pytest.mark.parametrize("tied", [True, False])
def test_shapes_and_counts_are_transformers(tmp_path: Path, model_type: str, tied: bool) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint(tmp_path / "m", model_type, tied=tied, intermediate=96, dtype=torch.bfloat16))
    model = load_model(checkpoint.path)
    block = model.get_submodule(checkpoint.family.blocks)[0]
    linears = {name: tuple(module.weight.shape) for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)}
    assert checkpoint.linear_widths() == linears
    assert set(checkpoint.family.linears) == set(linears)
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 2)
    assert checkpoint.num_parameters == matrices
    assert (checkpoint.layout, checkpoint.dtype, checkpoint.tied, checkpoint.num_layers) == ("dense", "bfloat16", tied, 2)
    stored = sum(info.numel for info in checkpoint.tensors.values())
    assert stored == sum(parameter.numel() for parameter in model.parameters())
    for path in (checkpoint.family.embed, checkpoint.family.norm, checkpoint.family.head):
        assert isinstance(model.get_submodule(path), torch.nn.Module)


def test_looking_imports_no_torch(checkpoint: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from compression.checkpoints.checkpoint import open_checkpoint; "
        "from compression.quantization.settings import plan_schemes; from compression.pruning.structure import pruned_width; "
        f"plan_schemes(open_checkpoint(Path({str(checkpoint)!r})), bits=4, group_size=32); pruned_width(128, 0.5, 32); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def broken(change: str, path: Path) -> None:
    weights = path / "model.safetensors"
    match change:
        case "no directory":
            shutil.rmtree(path)
        case "no config":
            (path / "config.json").unlink()
        case "no json":
            (path / "config.json").write_text("{")
        case "no tokenizer":
            (path / "tokenizer.json").unlink()
        case "no weights":
            weights.unlink()
        case "pickled":
            weights.rename(path / "pytorch_model.bin")
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-10])
        case "damaged":
            weights.write_bytes(b"\x10\0\0\0\0\0\0\0not json at all!")
        case "damaged index":
            weights.rename(path / "weights.safetensors")
            (path / "model.safetensors.index.json").write_text("{}")
        case "missing shard":
            weights.unlink()
            (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("no directory", "no model directory"),
        ("no config", "no config.json"),
        ("no json", "is not JSON"),
        ("no tokenizer", "no tokenizer.json"),
        ("no weights", "no model.safetensors"),
        ("pickled", "pickled weights"),
        ("truncated", "truncated"),
        ("damaged", "damaged"),
        ("damaged index", "no weight_map"),
        ("missing shard", "00001-of-00002.safetensors is missing"),
    ],
)
def test_what_cannot_be_opened_says_why(tmp_path: Path, checkpoint: Path, change: str, says: str) -> None:
    shutil.copytree(checkpoint, tmp_path / "m")
    broken(change, tmp_path / "m")
    with pytest.raises(UnusableModel, match=says) as refused:
        open_checkpoint(tmp_path / "m")
    assert refused.value.key == "model"


def test_an_unknown_architecture_is_named(tmp_path: Path, checkpoint: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    with pytest.raises(UnusableModel, match=r"'mamba'.*llama, mistral"):
        _ = open_checkpoint(tmp_path / "m").family


def test_one_file_wins_over_an_index(tmp_path: Path, checkpoint: Path) -> None:
    other = tiny_checkpoint(tmp_path / "other", seed=9)
    shutil.copytree(checkpoint, tmp_path / "m")
    shutil.copy(other / "model.safetensors", tmp_path / "m" / "model-00001-of-00001.safetensors")
    names = open_checkpoint(other).tensors
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = load_model(tmp_path / "m").state_dict()
    for name, tensor in read_tensors(tmp_path / "m", names).items():
        torch.testing.assert_close(tensor, loaded[name])
        assert not torch.equal(tensor, read_tensors(other, [name])[name]) or "norm" in name


@pytest.mark.parametrize("key", ["tie_word_embeddings", "max_position_embeddings", "dtype"])
def test_nothing_absent_is_guessed(tmp_path: Path, checkpoint: Path, key: str) -> None:
    shutil.copytree(checkpoint, tmp_path / "m")
    config = json.loads((checkpoint / "config.json").read_text())
    del config[key]
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    found = open_checkpoint(tmp_path / "m")
    with pytest.raises(UnusableModel, match=key):
        _ = found.tied, found.max_length, found.dtype


def test_missing_tensors_are_not_made_up(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "m", tied=False)
    tensors = load_file(path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnusableModel, match=r"lm_head\.weight"):
        load_model(path)
