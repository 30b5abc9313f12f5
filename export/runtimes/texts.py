"""The tokenizers of runtimes that leave text to others: the Hugging Face one in their directory. And chat templates, for all."""

import json
from pathlib import Path
from typing import Any

from compression.checkpoints.loading import load_tokenizer
from compression.data.rows import encode_prompts
from compression.data.templates import Conversation, conversation, render
from compression.errors import Incompatible, UnusableModel


class HuggingFaceText:
    """Implements compression.evaluation.text.Text with a directory's tokenizer.json. Raises UnusableModel without one."""

    def __init__(self, directory: Path):
        if not (directory / "tokenizer.json").is_file():
            raise UnusableModel(f"{directory} has no tokenizer.json, without which there is no text", key="model")
        self._tokenizer = load_tokenizer(directory)
        self.ends = frozenset(_ends(directory)) | {token for token in [self._tokenizer.eos_token_id] if token is not None}

    @property
    def templated(self) -> bool:
        return _template(self._tokenizer.chat_template) is not None

    def encode(self, text: str) -> list[int]:
        return encode_prompts(self._tokenizer, [text])[0]

    def encode_chat(self, message: str, system: str | None = None) -> list[int]:
        rendered = render_chat(self._tokenizer.chat_template, conversation(message, system), self._tokenizer.special_tokens_map)
        return self._tokenizer(rendered, add_special_tokens=False).input_ids

    def decode(self, tokens: list[int]) -> str:
        decoded = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(decoded, str)  # a list of lists would give a list
        return decoded


def _ends(directory: Path) -> list[int]:
    """End-of-text tokens that the model's configuration names: there may be several, of which the tokenizer knows one."""
    found: list[int] = []
    for name in ("generation_config.json", "config.json", "genai_config.json"):
        if (directory / name).is_file():
            settings = json.loads((directory / name).read_text())
            named = settings.get("model", settings).get("eos_token_id")
            found += named if isinstance(named, list) else [] if named is None else [named]
    return found


def render_chat(template: str | dict[str, str] | None, messages: Conversation, special_tokens: dict[str, Any]) -> str:
    """A conversation in a chat template, up to where the answer begins. Raises Incompatible without a template, or where it refuses."""
    from jinja2 import TemplateError

    template = _template(template)
    if template is None:
        raise Incompatible("this model has no chat template; leave --chat out", key="chat")
    try:
        return render(template, messages, special_tokens)
    except TemplateError as error:
        raise Incompatible(f"the model's chat template does not take this message: {error}", key="chat") from None


def _template(template: str | dict[str, str] | None) -> str | None:
    """The template for plain conversations, where a tokenizer has several by their use."""
    return template.get("default") if isinstance(template, dict) else template
