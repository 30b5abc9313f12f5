from pathlib import Path

import pytest
import torch

from compression.checkpoints.loading import load_model, save_model
from compression.context import Context
from compression.evaluation.sparsity import sparsity
from compression.pruning import UnstructuredSettings, prune_unstructured
from compression.quantization.rtn import quantize_rtn
from compression.quantization.settings import RTNSettings


def test_zeros_of_the_blocks_are_counted_and_those_of_embeddings_are_not(checkpoint: Path, tmp_path: Path) -> None:
    model = load_model(checkpoint)
    assert sparsity(checkpoint) == 0
    with torch.no_grad():
        model.model.embed_tokens.weight[:10] = 0
        model.model.layers[1].mlp.up_proj.weight[:32] = 0
    save_model(model, tmp_path / "sparse", like=checkpoint)
    layers = [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert sparsity(tmp_path / "sparse") == pytest.approx(32 * 64 / sum(m.weight.numel() for m in layers))


def test_a_quantized_model_is_as_sparse_as_its_masks_say(checkpoint: Path, tmp_path: Path) -> None:
    prune_unstructured(checkpoint, tmp_path / "sparse", UnstructuredSettings(method="magnitude", sparsity=0.25), context=Context())
    quantize_rtn(tmp_path / "sparse", tmp_path / "both", RTNSettings(group_size=32), context=Context())
    quantize_rtn(checkpoint, tmp_path / "dense", RTNSettings(group_size=32), context=Context())
    assert sparsity(tmp_path / "sparse") == sparsity(tmp_path / "both") == pytest.approx(0.25, abs=1e-3)
    assert sparsity(tmp_path / "dense") is None
