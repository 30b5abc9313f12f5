"""What planning asks of text, tokenizer and chat template: it must say what the stage would find."""

import json
import shutil
from pathlib import Path

import pytest

from compression.checkpoints.loading import load_tokenizer
from compression.data import DataSpec, calibration_windows, evaluation_windows, training_rows
from compression.data.fill import check_calibration, check_evaluation, check_prompts, check_training
from compression.data.plain import PlainTokenizer, plain_tokenizer
from compression.data.rows import encode_choices, prompts_of, start_token
from compression.data.sources import questions
from compression.data.templates import chat_template, check_template, conversation, render, special_tokens
from compression.errors import EdgepressError, UnusableData, UnusableModel
from tests.tiny import SENTENCES

TEMPLATES = [
    "{{ bos_token }}{% for m in messages %}\n  [{{ m.role }}]{{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}\n{%- if add_generation_prompt %}[assistant] {% endif %}",
    "{% set ns = namespace(system='none') %}{% for m in messages %}{% if m.role == 'system' %}{% set ns.system = m.content %}{% continue %}{% endif %}"
    "<{{ ns.system }}>{{ m | tojson }}{% endfor %}{% generation %}?{% endgeneration %}",
    "{{ dict(a=1).a }}{% if not tools %}{{ messages[0].content.split('\\n')[-1] }}{% endif %}{{ strftime_now('%Y')[:2] }}",
]
STRICT = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('A system message must come first') }}{% endif %}{{ messages[-1].content }}"
)


def model_with(checkpoint: Path, folder: Path, template: object = None, **settings: object) -> Path:
    """A model's directory with another chat template and other entries of tokenizer_config.json."""
    shutil.copytree(checkpoint, folder)
    file = folder / "tokenizer_config.json"
    entries = json.loads(file.read_text()) | ({"chat_template": template} if template else {}) | settings
    file.write_text(json.dumps({name: value for name, value in entries.items() if value is not None}))
    return folder


def corpus(folder: Path, documents: int, **more: object) -> DataSpec:
    for split in ("train", "test"):
        (folder / f"{split}.txt").write_text("\n\n".join(f"{SENTENCES[n % 2]} {n}" for n in range(documents)))
    return DataSpec.model_validate({"text": {"path": str(folder)}, "length": 32, **more})


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_templates_are_rendered_as_transformers_does(checkpoint: Path, tmp_path: Path, template: str, system: str | None) -> None:
    model = model_with(checkpoint, tmp_path / "model", template)
    messages = conversation("Where is the lamp?\n", system)
    expected = load_tokenizer(model).apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert render(template, messages, special_tokens(model)) == expected
    assert chat_template(model) == template
    spec = DataSpec(text="embedded", questions="embedded", evaluation_questions=3)
    for question in questions(spec, "test"):
        assert encode_choices(plain_tokenizer(model), question, system) == encode_choices(load_tokenizer(model), question, system)


def test_a_template_that_wants_a_system_message_says_so(checkpoint: Path, tmp_path: Path) -> None:
    model = model_with(checkpoint, tmp_path / "model", STRICT)
    with pytest.raises(UnusableData, match=r"A system message must come first.*data\.questions\.system") as caught:
        check_template(model, None)
    assert caught.value.key == "questions"
    check_template(model, "Be brief.")
    check_template(checkpoint, None)  # without a template
    with pytest.raises(UnusableData, match="A system message must come first"):
        encode_choices(load_tokenizer(model), questions(DataSpec(text="embedded", questions="embedded"), "test")[0])


def test_of_several_templates_the_default_counts(checkpoint: Path, tmp_path: Path) -> None:
    named = [{"name": "default", "template": TEMPLATES[0]}, {"name": "tool_use", "template": "x"}]
    assert chat_template(model_with(checkpoint, tmp_path / "one", named)) == TEMPLATES[0]
    with pytest.raises(UnusableModel, match="tool_use"):
        chat_template(model_with(checkpoint, tmp_path / "two", named[1:]))


def refuses(check: object, *arguments: object, **more: object) -> str | None:
    """The key of the parameter at fault; an empty text where nothing is refused."""
    try:
        check(*arguments, **more)  # type: ignore[operator]
    except EdgepressError as error:
        return error.key
    return ""


@pytest.mark.parametrize("documents", [1, 6, 20, 40])
@pytest.mark.parametrize("wanted", [1, 5, 9, 11, 40])
def test_planning_refuses_what_the_stage_would(checkpoint: Path, tmp_path: Path, documents: int, wanted: int) -> None:
    spec, tokenizer = corpus(tmp_path, documents, calibration_windows=wanted), load_tokenizer(checkpoint)
    for seed in (0, 1):
        assert refuses(check_calibration, spec, checkpoint, 320, seed) == refuses(calibration_windows, spec, tokenizer, seed)
    assert refuses(check_evaluation, spec, checkpoint, 320) == refuses(evaluation_windows, spec, tokenizer)
    assert refuses(check_training, spec, checkpoint, 320, on_questions=False) == refuses(training_rows, spec, tokenizer)
    for count in (2, 1000):
        assert refuses(check_prompts, spec, checkpoint, count) == refuses(prompts_of, spec_texts(tmp_path), tokenizer, count)


def spec_texts(folder: Path) -> list[str]:
    return (folder / "train.txt").read_text().split("\n\n")


def test_a_token_without_a_row_is_named(checkpoint: Path, tmp_path: Path) -> None:
    spec = corpus(tmp_path, 40, calibration_windows=2, questions="embedded")
    for check in (check_evaluation, lambda *given: check_calibration(*given, 0), lambda *given: check_training(*given, on_questions=False)):
        with pytest.raises(UnusableData, match=r"the embedding of .* has only 300 rows; the tokenizer got .* enlarge the embedding"):
            check(spec, checkpoint, 300)


def test_a_tokenizer_without_begin_and_end(checkpoint: Path, tmp_path: Path) -> None:
    assert start_token(PlainTokenizer(checkpoint)) == 0  # type: ignore[arg-type]
    bare = model_with(checkpoint, tmp_path / "bare", bos_token=None, eos_token=None)
    (bare / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(UnusableModel, match="neither BOS nor EOS"):
        start_token(PlainTokenizer(bare))  # type: ignore[arg-type]


def test_a_damaged_tokenizer_is_named(checkpoint: Path, tmp_path: Path) -> None:
    broken = model_with(checkpoint, tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(UnusableModel, match=r"tokenizer\.json"):
        plain_tokenizer(broken)
