"""Our files against those of llama.cpp's own converter: same tensors, same metadata that matters.

The converter is in llama-cpp-python's source package (vendor/llama.cpp: convert_hf_to_gguf.py, conversion/, gguf-py/), in no wheel, and not
copied here. These tests run where it was unpacked: in $EDGEPRESS_LLAMA_CPP, or ~/.cache/edgepress-bench/llama.cpp.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from tests.export.test_gguf import write
from tests.export.test_gguf_families import SHAPES, telling_checkpoint

LLAMA_CPP = Path(os.environ.get("EDGEPRESS_LLAMA_CPP", Path.home() / ".cache" / "edgepress-bench" / "llama.cpp"))
needs_converter = pytest.mark.skipif(
    not (LLAMA_CPP / "convert_hf_to_gguf.py").is_file(),
    reason=f"llama.cpp's converter is not in {LLAMA_CPP}: unpack it from `pip download --no-binary :all: --no-deps llama-cpp-python`",
)
# The converter tells byte-level BPE by a hash of token ids, which knows no vocabulary of a test: told here what ours is.
CONVERT = """
import json, runpy, sys, types
import transformers
transformers.AutoTokenizer = transformers.PreTrainedTokenizerFast  # which reads tokenizer.json; the classes of some families rebuild it
sys.path.insert(0, {root!r})
sys.path.insert(1, {root!r} + "/gguf-py")
from conversion.base import TextModel
sys.modules["sentencepiece"] = types.SimpleNamespace(SentencePieceProcessor=None)  # asked for before it is clear that no model wants it
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
for source, target in json.load(sys.stdin):
    sys.argv = ["convert_hf_to_gguf.py", source, "--outfile", target, "--outtype", "f32"]
    runpy.run_path({root!r} + "/convert_hf_to_gguf.py", run_name="__main__")
"""
COMPARED = [shape for shape in SHAPES if shape != "phi3, longrope"]  # whose context theirs does not cut
# Why a key may be missing on one side. general.* of theirs describes the directory (name, size label), which bytes must not depend on.
OURS_ALONE = {
    "vocab_size": "theirs writes it for some families only", "attention.sliding_window_pattern": "theirs leaves llama.cpp's default",
    "rope.freq_base_swa": "theirs leaves llama.cpp's default", "rope.dimension_count": "theirs leaves it to head_dim",
    "attention.key_length": "theirs leaves it to hidden_size / heads", "attention.value_length": "theirs leaves it to hidden_size / heads",
    "rope.freq_base": "theirs leaves llama.cpp's default", "tokenizer.ggml.add_eos_token": "theirs leaves llama.cpp's default",
    "rope.scaling.yarn_beta_fast": "theirs leaves llama.cpp's default", "rope.scaling.yarn_beta_slow": "theirs leaves llama.cpp's default",
}  # fmt: skip
THEIRS_ALONE = {
    "attention.sliding_window": "of phi3, where llama.cpp ignores it and our context is cut to it",
    "rope.scaling.original_context_length": "of phi3 without longrope: llama.cpp's default is the context",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with <shape>/model, ours in <shape>/out/model.gguf and theirs, all made by one process, in <shape>/official.gguf."""
    root = tmp_path_factory.mktemp("official")
    for shape in COMPARED:
        family, settings = SHAPES[shape]
        source = telling_checkpoint(root / shape / "model", family, **settings)
        if family == "phi3":  # theirs wants it, and transformers' own Phi3Config writes it beside the rope settings only
            config = json.loads((source / "config.json").read_text())
            (source / "config.json").write_text(json.dumps(config | {"original_max_position_embeddings": 128}))
            spoken = json.loads((source / "tokenizer_config.json").read_text())
            (source / "tokenizer_config.json").write_text(json.dumps(spoken | {"tokenizer_class": "GPT2Tokenizer"}))  # as Phi-4's says
        write(source, root / shape / "out", "f32")
    jobs = json.dumps([(str(root / shape / "model"), str(root / shape / "official.gguf")) for shape in COMPARED])
    done = subprocess.run(
        [sys.executable, "-c", CONVERT.format(root=str(LLAMA_CPP))],
        input=jobs, capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-1500:]
    return root


def metadata(reader: gguf.GGUFReader) -> dict[str, object]:
    architecture = reader.fields["general.architecture"].contents()
    return {
        name.removeprefix(f"{architecture}."): field.contents()
        for name, field in reader.fields.items()
        if not name.startswith(("GGUF.", "general."))
    }


@needs_converter
@pytest.mark.parametrize("shape", COMPARED)
def test_same_tensors_and_metadata_as_the_official_converter(files: Path, shape: str) -> None:
    ours, theirs = gguf.GGUFReader(files / shape / "out" / "model.gguf"), gguf.GGUFReader(files / shape / "official.gguf")
    found, expected = ({t.name: t for t in reader.tensors} for reader in (ours, theirs))
    if shape == "olmo2, tied":  # theirs forgets the head that llama.cpp's graph needs
        assert "output.weight" not in expected and found.pop("output.weight")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        rows = len(tensor.data) if shape.startswith("gemma3") else None  # theirs leaves out rows of the embedding that no token has
        np.testing.assert_array_equal(found[name].data[:rows], tensor.data, err_msg=name)
    our_keys, their_keys = metadata(ours), metadata(theirs)
    assert our_keys.keys() - their_keys.keys() <= OURS_ALONE.keys()
    assert their_keys.keys() - our_keys.keys() <= THEIRS_ALONE.keys()
    their_keys["tokenizer.ggml.pre"] = our_keys["tokenizer.ggml.pre"]  # what theirs was told above
    different = {key: (our_keys[key], their_keys[key]) for key in our_keys.keys() & their_keys.keys() if our_keys[key] != their_keys[key]}
    assert different == {}
