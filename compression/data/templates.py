"""The chat template of a model's directory, rendered as transformers does. Imports no torch, so that planning can ask it.

transformers' own renderer (`transformers.utils.chat_template_utils`) imports torch where it is installed; the environment here has its settings.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from compression.checkpoints.checkpoint import MORE_TEMPLATES
from compression.errors import UnusableData, UnusableModel

if TYPE_CHECKING:
    from jinja2 import Environment

Conversation = list[dict[str, str]]
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def conversation(message: str, system: str | None = None) -> Conversation:
    """A user's message, behind a system message where there is one."""
    return [*([{"role": "system", "content": system}] if system is not None else []), {"role": "user", "content": message}]


def chat_template(directory: Path) -> str | None:
    """The template for plain conversations that a model's directory holds, as transformers finds it; None without one.

    Raises UnusableModel where there are several by their use, and none of them is `default`.
    """
    found = chat_templates(directory)
    if found and "default" not in found:
        raise UnusableModel(f"{directory} has several chat templates ({', '.join(found)}) and none of them is named default", key="model")
    return found.get("default")


def chat_templates(directory: Path) -> dict[str, str]:
    """Every chat template of a model's directory by its name; the only one is called "default"."""
    written = _read(directory / "tokenizer_config.json").get("chat_template") or {}
    if isinstance(written, list):
        written = {each["name"]: each["template"] for each in written}
    found = {"default": written} if isinstance(written, str) else dict(written)
    if (own := directory / "chat_template.jinja").is_file():
        found["default"] = own.read_text(encoding="utf-8")
    return found | {file.stem: file.read_text(encoding="utf-8") for file in sorted((directory / MORE_TEMPLATES).glob("*.jinja"))}


def check_template(directory: Path, system: str | None) -> None:
    """Ask the chat template of a model's directory, where there is one, for a conversation of one question.

    Raises UnusableData, with the template's own words, where it refuses it.
    """
    if (template := chat_template(directory)) is not None:
        with refusals(system):
            render(template, conversation("Where is the lamp?", system), special_tokens(directory))


@contextmanager
def refusals(system: str | None) -> Iterator[None]:
    """What a template raises, as our error."""
    from jinja2 import TemplateError

    try:
        yield
    except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:  # a template is a program
        remedy = "if it wants a system message, give it one in" if system is None else "change or leave out the system message in"
        raise UnusableData(
            f"the model's chat template refuses a question: {error}; {remedy} data.questions.system", key="questions"
        ) from None


def render(template: str, messages: Conversation, special: Mapping[str, str]) -> str:
    """A conversation as text, up to where the answer begins. Raises jinja2.TemplateError as the template does."""
    return environment().from_string(template).render(messages=messages, tools=None, documents=None, add_generation_prompt=True, **special)


def special_tokens(directory: Path) -> dict[str, str]:
    """Special tokens by their name, as templates use them; the empty text for those that neither file of the tokenizer names."""
    named = _read(directory / "special_tokens_map.json") | _read(directory / "tokenizer_config.json")
    texts = {name: value.get("content") if isinstance(value := named.get(name), Mapping) else value for name in _SPECIAL}
    return {name: text if isinstance(text, str) else "" for name, text in texts.items()}


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:  # no JSON, no UTF-8
        raise UnusableModel(f"{file} cannot be read: {error}", key="model") from None


@cache
def environment() -> "Environment":
    """transformers' sandbox."""
    from jinja2 import TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """{% generation %}, which marks the assistant's part for training, and renders what it holds."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Names(Namespace):
        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise SecurityError(f"a chat template cannot store {name!r} in a namespace")
            super().__setitem__(name, value)

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = tojson
    made.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": lambda *pairs, **entries: dict(*pairs, **entries),  # noqa: PLW0108  the class itself has attributes to reach
        "namespace": Names,
    }
    return made
