from pathlib import Path

import pytest
from pydantic import ValidationError

from compression.errors import Incompatible, UnusableData
from compression.evaluation.checks import check_evaluation, extras
from compression.evaluation.spec import EvaluationSpec


def test_the_default_shows_a_few_samples_and_needs_nothing() -> None:
    spec = EvaluationSpec()
    assert (spec.generations, spec.red_team_set, spec.energy_source, extras(spec)) == (3, None, "counters", {})
    check_evaluation(spec, Path(), 128)


def test_the_release_suite_turns_on_what_a_release_is_judged_by() -> None:
    spec = EvaluationSpec(suite="release")
    assert (spec.generations, spec.red_team_set, spec.energy_source) == (16, "embedded", "estimate")
    assert extras(spec) == {"energy": "suite"}
    own = EvaluationSpec(suite="release", red_team="own.jsonl", energy="counters", samples=20)
    assert (own.generations, own.red_team_set, own.energy_source, extras(own)) == (20, "own.jsonl", "counters", {})


def test_what_needs_a_package_says_which_key_needs_it() -> None:
    assert extras(EvaluationSpec(harness=("hellaswag",), energy="estimate")) == {"harness": "harness", "energy": "energy"}
    assert extras(EvaluationSpec(summarization="x.jsonl")) == {"harness": "summarization"}


@pytest.mark.parametrize("key", ["question_answering", "summarization", "red_team"])
def test_files_are_read_whole_before_any_work(key: str, tmp_path: Path) -> None:
    good = {
        "question_answering": '{"question": "x", "answers": ["y"]}',
        "summarization": '{"document": "x", "summary": "y"}',
        "red_team": '{"category": "x", "prompt": "y"}',
    }[key]
    file = tmp_path / "items.jsonl"
    file.write_text(f"{good}\n" * 300 + "not json\n")
    with pytest.raises(UnusableData, match=r"items\.jsonl:301: not JSON") as caught:
        check_evaluation(EvaluationSpec.model_validate({key: str(file)}), Path(), 128)
    assert caught.value.key == key
    file.write_text("\n")
    with pytest.raises(UnusableData, match="holds nothing"):
        check_evaluation(EvaluationSpec.model_validate({key: str(file)}), Path(), 128)
    file.write_text(good)
    check_evaluation(EvaluationSpec.model_validate({key: str(file)}), Path(), 128)


def test_chat_prompts_need_a_chat_template(checkpoint: Path, tmp_path: Path) -> None:
    spec = EvaluationSpec(harness_chat=True)
    with pytest.raises(Incompatible, match="no chat template") as caught:
        check_evaluation(spec, checkpoint, 128)
    assert caught.value.key == "harness_chat"
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    check_evaluation(spec, tmp_path, 128)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    check_evaluation(spec, tmp_path, 128)


def test_generations_must_fit_into_the_model() -> None:
    with pytest.raises(Incompatible, match="128 new tokens leave no room"):
        check_evaluation(EvaluationSpec(new_tokens=128), Path(), 128)
    with pytest.raises(ValidationError):
        EvaluationSpec.model_validate({"suite": "relase"})
