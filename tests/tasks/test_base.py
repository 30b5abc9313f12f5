"""Opening a base: normalised once, known by what is read of it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from compression.errors import UnusableModel
from tasks.base import EMBEDDED, is_unchanged, open_base
from tests.tiny import tiny_checkpoint


def test_normal_directory_is_its_own_base(tmp_path: Path, checkpoint: Path) -> None:
    base = open_base(str(checkpoint), None, None, tmp_path)
    assert base.path == base.origin == checkpoint and base.content == base.found == base.identity


def test_unread_files_are_not_in_content(tmp_path: Path, checkpoint: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "m")
    before = open_base(str(tmp_path / "m"), None, None, tmp_path)
    (tmp_path / "m" / "notes.txt").write_text("anything")
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"old")
    assert open_base(str(tmp_path / "m"), None, None, tmp_path).identity == before.identity
    (tmp_path / "m" / "README.md").write_text("license: mit")  # it states the licence, which artifacts carry
    after = open_base(str(tmp_path / "m"), None, None, tmp_path)
    assert after.identity != before.identity and after.license == "mit" and not is_unchanged(before, tmp_path)


def test_rewritten_model_gets_another_identity(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "m", "gemma3_text", hidden=256, heads=1, kv_heads=1)
    whole = open_base(str(path), None, None, tmp_path)
    config = json.loads((path / "config.json").read_text())
    del config["tie_word_embeddings"], config["head_dim"]
    (path / "config.json").write_text(json.dumps(config))
    base = open_base(str(path), None, None, tmp_path)
    assert base.origin == path and base.path.parent.parent == tmp_path / "bases"
    assert base.checkpoint.tied and base.checkpoint.config["head_dim"] == 256
    assert len({base.found, base.content, whole.content}) == 3 and is_unchanged(base, tmp_path)
    assert (base.path / "model.safetensors").resolve() == path / "model.safetensors"


@pytest.mark.slow
def test_child_finds_same_base(tmp_path: Path, checkpoint: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "m")
    config = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "x.Y"}}))
    code = (
        "import sys, json; from pathlib import Path; from tasks.base import open_base\n"
        f"base = open_base({str(tmp_path / 'm')!r}, None, None, Path({str(tmp_path / 'a')!r}))\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "print(json.dumps([base.content, list(base.warnings)]))\n"
        "(Path(base.origin) / 'config.json').write_text(json.dumps({'model_type': 'vit'}))\n"
        f"open_base(base.source, None, None, Path({str(tmp_path / 'a')!r}))\n"
    )
    here = open_base(str(tmp_path / "m"), None, None, tmp_path / "b")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False)
    assert json.loads(done.stdout) == [here.content, list(here.warnings)], done.stderr
    assert "UnusableModel" in done.stderr and "model_type 'vit'" in done.stderr


def test_refused_model_leaves_nothing(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "m")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(UnusableModel, match=r"layers\.2"):
        open_base(str(path), None, None, tmp_path)
    assert not list(tmp_path.glob("bases/*"))


def test_embedded_model_needs_no_lock(tmp_path: Path) -> None:
    assert open_base("embedded", None, None, tmp_path).path == EMBEDDED and not (tmp_path / "bases").exists()


def test_damaged_cache_is_rebuilt(tmp_path: Path, checkpoint: Path) -> None:
    before = open_base(str(checkpoint), None, None, tmp_path)
    for file in [*tmp_path.glob("digests/*.json"), *tmp_path.glob("bases/*/report.json")]:
        file.write_text(file.read_text()[:-9])
    assert open_base(str(checkpoint), None, None, tmp_path) == before
