"""The tokenizers that `generate` uses: llama.cpp's own against the Hugging Face one, and chat templates against transformers'."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from compression.checkpoints.loading import load_tokenizer
from compression.context import Context
from compression.errors import Incompatible, UnusableModel
from compression.evaluation.text import Text, stream_text
from export.gguf import GgufSettings, export_gguf
from export.runtimes import open_runtime, open_text
from tests.tiny import SENTENCES, tiny_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[answer] {% endif %}"
)


@pytest.fixture(scope="module")
def chatty(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a chat template and a second end-of-text token."""
    path = tmp_path_factory.mktemp("chatty") / "model"
    shutil.copytree(checkpoint, path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    settings = json.loads((path / "generation_config.json").read_text())
    (path / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [1, 7]}))
    return path


@pytest.fixture(scope="module")
def gguf(chatty: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file alone, under another name."""
    out = tmp_path_factory.mktemp("gguf")
    export_gguf(chatty, out / "whole", GgufSettings(type="f32"), context=Context())
    shutil.copy(out / "whole" / "model.gguf", out / "copied.gguf")
    return out / "copied.gguf"


@pytest.fixture(params=["transformers", "llama.cpp"])
def text(request: pytest.FixtureRequest, chatty: Path, gguf: Path) -> Iterator[Text]:
    path = chatty if request.param == "transformers" else gguf
    runtime = open_runtime(path, threads=1)
    yield open_text(path, runtime)
    runtime.close()


def test_tokens_are_those_of_transformers(text: Text, chatty: Path) -> None:
    tokenizer = load_tokenizer(chatty)
    for sentence in [*SENTENCES, "", "</s>in the middle", "  spaces   and\n\n"]:
        tokens = text.encode(sentence)
        assert tokens == tokenizer(sentence).input_ids
        assert text.decode(tokens) == tokenizer.decode(tokens, skip_special_tokens=True)
    assert text.encode("<s>The lamp") == tokenizer("The lamp").input_ids  # begin-of-text once


def test_a_prompt_ends_without_end_of_text(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "model")
    tiny_tokenizer(eos=True).save_pretrained(tmp_path / "model")
    expected = load_tokenizer(checkpoint)("The lamp is in the").input_ids
    export_gguf(tmp_path / "model", tmp_path / "gguf", GgufSettings(type="f32"), context=Context())
    for path in (tmp_path / "model", tmp_path / "gguf"):
        runtime = open_runtime(path, threads=1)
        assert open_text(path, runtime).encode("The lamp is in the") == expected
        runtime.close()


def test_streamed_text_is_the_whole_text(text: Text) -> None:
    for sentence in SENTENCES:
        tokens = text.encode(sentence)
        assert text.decode(tokens[:3]) + "".join(stream_text(text, tokens[:3], tokens[3:])) == sentence
    assert "".join(stream_text(text, [], [*text.encode("one"), 1, *text.encode("two")])) == "one"


def test_chat_is_the_template_of_transformers(text: Text, chatty: Path) -> None:
    conversation = [{"role": "user", "content": "Where is the lamp?"}]
    expected = load_tokenizer(chatty).apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
    assert text.encode_chat("Where is the lamp?") == expected
    conversation = [{"role": "system", "content": "Be brief."}, *conversation]
    expected = load_tokenizer(chatty).apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
    assert text.encode_chat("Where is the lamp?", "Be brief.") == expected


def test_end_of_text(chatty: Path, gguf: Path) -> None:
    runtime = open_runtime(chatty, threads=1)
    assert open_text(chatty, runtime).ends == {1, 7}
    opened = open_runtime(gguf, threads=1)
    assert 1 in open_text(gguf, opened).ends and 5 not in open_text(gguf, opened).ends
    opened.close()


def test_without_a_chat_template_or_tokenizer(checkpoint: Path, tmp_path: Path) -> None:
    runtime = open_runtime(checkpoint, threads=1)
    with pytest.raises(Incompatible, match="no chat template"):
        open_text(checkpoint, runtime).encode_chat("x")
    with pytest.raises(UnusableModel, match=r"no tokenizer\.json"):
        open_text(tmp_path, runtime)
