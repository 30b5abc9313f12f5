"""generate, bench and inspect through the real command line, on checkpoints, artifacts and what is neither."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from compression.checkpoints.checkpoint import file_digests, open_checkpoint
from compression.context import Context
from export.gguf import GgufSettings, export_gguf
from tasks.artifact import complete_artifact
from tasks.base import Base
from tasks.execution import _compare_speed
from tasks.planned_stage import Result
from tasks.stage import Artifact
from tasks.store.store import Store
from tests.flows.recipes import edgepress
from tests.waiting import PATIENCE

EDGEPRESS = [sys.executable, "-P", "-m", "flows.cli.main"]


@pytest.fixture(scope="module")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF artifact with edgepress.json and card, as an export stage leaves it."""
    out = tmp_path_factory.mktemp("artifact") / "gguf"
    export_gguf(checkpoint, out, GgufSettings(type="q8_0"), context=Context())
    document = {"uses": "export.gguf", "parameters": {"uses": "export.gguf", "type": "q8_0", "head_type": None}, "libraries": {"gguf": "1"}}
    before = [("2" * 64, {**document, "uses": "prune.width", "parameters": {"keep": 0.5}})]
    base = Base(open_checkpoint(checkpoint), "1" * 64, "1" * 64, str(checkpoint), None, "mit", checkpoint, "1" * 64)
    complete_artifact(out, Artifact("llama.cpp", "int8", 0), document, "3" * 64, before, base)
    return out


def test_generate_streams_and_reports(artifact: Path, checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    texts = []
    for model in (artifact, artifact / "model.gguf", checkpoint):
        code, out, err = edgepress(["generate", str(model), "-p", "The lamp", "-n", "12", "--temp", "0", "--threads", "1"], capfd)
        assert code == 0 and out.startswith("The lamp") and out.endswith("\n")
        assert "prompt tokens, first token after" in err and "tokens/s, loaded in" in err and err.count("\n") == 1
        texts.append(out)
    assert texts[0] == texts[1]
    drawn = [edgepress(["generate", str(artifact), "-p", "The", "-n", "20", "--seed", seed], capfd)[1] for seed in "112"]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["generate", "nowhere", "-p", "x"], "there is no file or directory nowhere"),
        (["generate", ".", "-p", "x"], "neither a checkpoint"),
        (["generate", "MODEL", "-p", "x", "--chat"], "no chat template"),
        (["generate", "MODEL", "-p", "x", "-n", "500"], "do not fit into the model's 128"),
        (["generate", "MODEL", "-p", "x", "--top-p", "0"], "top_p"),
        (["inspect", "nowhere"], "there is no file or directory nowhere"),
        (["bench", "MODEL", "nowhere"], "there is no file or directory nowhere"),
        (["bench", "MODEL", "--prompt", "8,x"], "not a list of lengths"),
    ],
)
def test_refusals(arguments: list[str], fragment: str, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    code, out, err = edgepress([str(artifact) if a == "MODEL" else a for a in arguments], capfd)
    assert (code, out) == (2, "") and fragment in err and "Traceback" not in err


@pytest.mark.slow
def test_ctrl_c_ends_generate_with_its_timings(checkpoint: Path) -> None:
    command = [*EDGEPRESS, "generate", str(checkpoint), "-p", "The lamp", "-n", "110", "--temp", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.read(len("The lamp") + 1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, "Traceback" in err) in {(130, False), (0, False)} and "tokens (" in err  # 0: it was faster than the signal


def test_bench_survives_a_broken_model(artifact: Path, checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.gguf").write_bytes((artifact / "model.gguf").read_bytes()[:-5000])
    command = ["bench", str(artifact), str(tmp_path), str(checkpoint), "--prompt", "8", "-n", "4", "--repeats", "2", "--threads", "1", "--json"]  # fmt: skip
    code, out, _ = edgepress(command, capfd)
    found = json.loads(out)
    assert code == 1 and [(row["runtime"], row["prompt"]) for row in found["rows"]] == [
        ("llama.cpp", 8),
        ("llama.cpp", 8),
        ("transformers", 8),
    ]
    for index, row in enumerate(found["rows"]):
        if index == 1:
            assert row["failed"] and "cannot open" in row["reason"]
        else:
            assert 0 < row["tokens_per_second_low"] <= row["tokens_per_second"] <= row["tokens_per_second_high"]
            assert row["first_token_seconds"] * row["prefill_tokens_per_second"] == pytest.approx(row["prompt"])


def test_inspect_an_artifact(artifact: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = edgepress(["inspect", str(artifact)], capfd)
    assert code == 0 and all(
        fragment in out for fragment in ("llama.cpp", "Q8_0", "prune.width", "license mit", "1 intact", "bits per weight")
    )
    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    with (copy / "model.gguf").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    code, out, _ = edgepress(["inspect", str(copy), "--json"], capfd)
    found = json.loads(out)
    assert (code, found["files"]) == (1, {"model.gguf": "differs"})
    assert [step["identity"][0] for step in found["steps"]] == ["2", "3"]
    assert edgepress(["inspect", str(copy), "--no-verify"], capfd)[0] == 0
    (copy / "edgepress.json").write_text("{")
    code, _, err = edgepress(["inspect", str(copy)], capfd)
    assert code == 2 and "edgepress.json is damaged" in err


def test_inspect_a_checkpoint_in_the_store(checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    store, parent = Store(tmp_path / "store"), "b" * 64
    for identity, inputs in ((parent, {"parent": "a" * 64}), ("c" * 64, {"parent": parent})):
        shutil.copytree(checkpoint, store.workplace(identity) / "out", dirs_exist_ok=True)
        document = {"uses": "prune.depth", "parameters": {"keep": 1}, "inputs": inputs, "libraries": {}}
        entry = store.commit(identity, document, metrics={}, seconds=0, warnings=[], curves=[])
    link = tmp_path / "link"
    link.symlink_to(entry.path)
    code, out, _ = edgepress(["inspect", str(link), "--json"], capfd)
    found = json.loads(out)
    assert code == 0 and found["kind"] == "checkpoint" and set(found["files"].values()) == {"intact"}
    assert [step["identity"][0] for step in found["steps"]] == ["a", "b", "c"] and len(found["files"]) == len(file_digests(checkpoint))
    (entry.path / "tokenizer_config.json").unlink()
    assert edgepress(["inspect", str(link)], capfd)[0] == 1


def test_artifacts_contain_no_path(artifact: Path, checkpoint: Path) -> None:
    facts, card = (artifact / "edgepress.json").read_text(), (artifact / "README.md").read_text()
    assert str(checkpoint.parent) not in facts + card and json.loads(facts)["base"]["source"] == "local model 111111111111"
    assert json.loads(facts)["files"].keys() == {"model.gguf"} == file_digests(artifact).keys() - {"edgepress.json", "README.md"}
    assert all(
        fragment in card
        for fragment in ("license: mit", "1. `prune.width`: keep 0.5", "2. `export.gguf`: type q8_0\n", "llama-cli", "0.01")
    )


@pytest.mark.parametrize(("mine", "warns"), [(95.0, False), (91.0, False), (89.0, True), (None, False)])
def test_a_slower_stage_warns_beyond_noise(mine: float | None, warns: bool) -> None:
    parent = Result("base", "base", [], "Cached", runtime="transformers", metrics={"tokens_per_second": 100.0})
    result = Result("gguf", "export.gguf", [], "Cached", runtime="llama.cpp", metrics={"tokens_per_second": mine} if mine else {})
    _compare_speed(result, parent)
    assert bool(result.warnings) == warns
    if warns:
        assert "89 tokens/s in llama.cpp against 100 in transformers" in result.warnings[0]
