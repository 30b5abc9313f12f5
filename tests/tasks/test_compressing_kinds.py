"""Every kind that prunes or quantizes on a tiny model of every family: what planning promises is what comes out."""

from pathlib import Path
from typing import Any

import pytest
import torch

from compression.checkpoints.checkpoint import open_checkpoint
from compression.checkpoints.families import FAMILIES
from compression.checkpoints.loading import load_model
from compression.checkpoints.masks import read_masks
from compression.context import Context
from compression.data import DataSpec
from compression.errors import Incompatible, MissingExtra, UnusableModel
from tasks.stage import Inputs, Stage, Workplace, check_accepts, stage_kinds
from tests.tiny import tiny_checkpoint, tiny_windows

COMPRESSING = sorted(
    uses for uses in stage_kinds() if uses.startswith(("prune.", "quantize.")) and uses not in ("prune.rigl", "prune.lottery")
)
PARAMETERS: dict[str, dict[str, Any]] = {
    "prune.depth": {"drop": 1}, "prune.width": {"keep": 0.5, "keep_heads": 0.5}, "prune.unstructured": {"sparsity": 0.5},
    "quantize.gptq": {"group_size": 32}, "quantize.awq": {"group_size": 32}, "quantize.rtn": {"group_size": 32},
}  # fmt: skip
ANY_DECODER = {"prune.unstructured", "quantize.rtn", "quantize.gptq", "quantize.fp8"}
DATA = DataSpec.model_validate("embedded")


@pytest.fixture(autouse=True)
def short_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compression.data.calibration_windows", lambda data, tokenizer, seed: tiny_windows(seed=seed % 97))


def stage(uses: str) -> Stage:
    return stage_kinds()[uses].model_validate({"uses": uses, **PARAMETERS.get(uses, {})})


def run(made: Stage, source: Path, folder: Path) -> Path:
    place = Workplace(folder / "out", folder / "work")
    place.out.mkdir(parents=True)
    place.work.mkdir()
    made.run(Inputs(source, {}), place, DATA, Context(seed=1))
    return place.out


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("uses", COMPRESSING)
def test_a_kind_makes_what_it_planned(tmp_path: Path, uses: str, family: str) -> None:
    source = tiny_checkpoint(tmp_path / "in", family, dtype=torch.bfloat16)
    made = stage(uses)
    planned = made.plan(check_accepts(made, open_checkpoint(source)), {}, DATA)
    result = open_checkpoint(run(made, source, tmp_path))
    assert (result.layout, result.sparse) == (planned.layout, planned.sparse)
    quantization, promised = (c.config.get("quantization_config", {}) for c in (result, planned))
    assert {key: value for key, value in quantization.items() if key != "damp_percent"} == promised
    assert {key: value for key, value in result.config.items() if key != "quantization_config"} == {
        key: value for key, value in planned.config.items() if key != "quantization_config"
    }
    with torch.no_grad():
        assert load_model(result.path)(tiny_windows(count=2)).logits.isfinite().all()


@pytest.mark.parametrize("uses", COMPRESSING)
def test_an_unlisted_architecture_is_taken_or_refused_in_planning(tmp_path: Path, uses: str) -> None:
    source = open_checkpoint(tiny_checkpoint(tmp_path / "in", "stablelm"))
    made = stage(uses)
    if uses not in ANY_DECODER:
        with pytest.raises(UnusableModel, match="no row in compression/checkpoints/families.py"):
            made.plan(check_accepts(made, source), {}, DATA)
        return
    planned = made.plan(check_accepts(made, source), {}, DATA)
    result = run(made, source.path, tmp_path)
    assert open_checkpoint(result).layout == planned.layout
    with torch.no_grad():
        assert load_model(result)(tiny_windows(count=2)).logits.isfinite().all()


@pytest.mark.parametrize("uses", [uses for uses in COMPRESSING if uses != "prune.depth"])
def test_what_is_pruned_stays_zero(tmp_path: Path, uses: str) -> None:
    sparse = run(stage("prune.unstructured"), tiny_checkpoint(tmp_path / "in", "llama"), tmp_path / "first")
    made = stage(uses)
    assert made.plan(check_accepts(made, open_checkpoint(sparse)), {}, DATA).sparse
    result = run(made, sparse, tmp_path / "second")
    masks, model = read_masks(result), load_model(result)
    assert masks.keys() == {f"model.layers.{index}.{path}.weight" for index in range(2) for path in FAMILIES["llama"].linears}
    for name, mask in masks.items():
        assert not model.get_parameter(name)[~mask].any()
        assert model.get_parameter(name)[mask].count_nonzero() > 0.8 * mask.sum()


def test_the_other_engine_is_refused_without_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = open_checkpoint(tiny_checkpoint(tmp_path / "in"))
    monkeypatch.setattr("tasks.extras.find_spec", lambda name: None)
    for uses in ("quantize.gptq", "quantize.awq"):
        made = stage_kinds()[uses].model_validate({"uses": uses, "group_size": 32, "engine": "gptqmodel"})
        with pytest.raises(MissingExtra, match="gptqmodel"):
            made.plan(source, {}, DATA)


def test_mixed_precision_is_refused_where_the_layout_holds_none(tmp_path: Path) -> None:
    source = open_checkpoint(tiny_checkpoint(tmp_path / "in"))
    kinds = stage_kinds()
    with pytest.raises(ValueError, match="layers"):
        kinds["quantize.awq"].model_validate({"uses": "quantize.awq", "layers": {"*.down_proj": {"bits": 8}}})
    made = kinds["quantize.gptq"].model_validate({"uses": "quantize.gptq", "group_size": 32, "layers": {"*.dawn_proj": {"bits": 8}}})
    with pytest.raises(Incompatible, match=r"no layer fits the pattern \*.dawn_proj"):
        made.plan(source, {}, DATA)
