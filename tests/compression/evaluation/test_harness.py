"""lm-evaluation-harness over our runtimes, judged by the harness's own Hugging Face model, and our multiple-choice scorer by the harness."""

import json
from pathlib import Path

import pytest
import yaml
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from compression.context import Context
from compression.errors import Incompatible, UnusableData
from compression.evaluation.harness import HarnessModel, evaluate_tasks
from compression.evaluation.harness_tasks import Task, check_tasks, find_tasks, fingerprint_tasks
from compression.evaluation.likelihood import continuation_likelihoods
from compression.evaluation.scorers import multiple_choice
from compression.evaluation.transformers_runtime import TransformersRuntime
from compression.loading import load_model, load_tokenizer
from compression.reference.world import Question
from export.runtimes import open_text

PAIRS = [
    ("The lamp is in the", " mill"),
    ("The lamp is in the", " barn"),
    ("The lamp is in the", "."),
    ("Where is the kettle? ", "in the barn"),
    ("", "Dalo owns the lamp"),
    ("<s>The bell", " and the lamp 日本語"),
    ("At noon Pemir went to the tower. " * 40, "to look for the bell"),  # longer than the model
]
QUESTIONS = [
    Question("The lamp is in the mill.", "Where is the lamp?", ("in the mill", "in the barn", "at noon", "a"), 0),
    Question("Dalo owns the lamp.", "Who owns it?", ("Dalo", "Pemir", "the kettle", "red"), 1),
    Question("At noon Pemir went to the tower.", "What for?", ("to look", "to look for the bell", "to", "bell"), 2),
    Question("Dalo owns the lamp and the red kettle.", "Who?", ("Dalo and Pemir", "Dalo", "nobody", "the kettle"), 3),
    Question("The bell is red.", "What colour is the bell?", ("red", "kettle", "lamp and bell", "tower"), 0),
    Question("Pemir went to the tower.", "Who went?", ("Dalo", "Pemir", "bell", "the red tower at noon"), 1),
]


@pytest.fixture(scope="module")
def ours(checkpoint: Path) -> HarnessModel:
    runtime = TransformersRuntime(checkpoint, threads=1)
    return HarnessModel(runtime, load_tokenizer(checkpoint), open_text(checkpoint, runtime), Context())


@pytest.fixture(scope="module")
def theirs(checkpoint: Path) -> HFLM:
    return HFLM(pretrained=load_model(checkpoint), tokenizer=load_tokenizer(checkpoint), batch_size=4, max_length=128, device="cpu")


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]  # type: ignore[arg-type]


def test_likelihoods_are_those_of_the_harness_own_model(ours: HarnessModel, theirs: HFLM) -> None:
    asked = requests("loglikelihood", PAIRS)
    mine, judged = ours.loglikelihood(asked, disable_tqdm=True), theirs.loglikelihood(asked, disable_tqdm=True)
    for (likelihood, greedy), (expected, is_greedy) in zip(mine, judged, strict=True):
        assert likelihood == pytest.approx(expected, rel=1e-5)
        assert greedy == is_greedy


def test_rolling_likelihoods_are_those_of_the_harness_own_model(ours: HarnessModel, theirs: HFLM) -> None:
    texts = [("The lamp is in the mill.",), ("At noon Pemir went to the tower to look for the bell. " * 15,)]
    asked = requests("loglikelihood_rolling", texts)
    assert ours.loglikelihood_rolling(asked) == pytest.approx(theirs.loglikelihood_rolling(asked, disable_tqdm=True), rel=1e-5)


def test_generated_text_is_that_of_the_harness_own_model(ours: HarnessModel, theirs: HFLM) -> None:
    prompts = ["The lamp is in the", "Dalo owns", "At noon Pemir went to the tower. " * 40, "Where is the kettle?"]
    free = theirs.generate_until(requests("generate_until", [(p, {"max_gen_toks": 12}) for p in prompts]), disable_tqdm=True)
    stops = [text[len(text) // 2 :][:2] for text in free]
    settings = [{"max_gen_toks": 12, "until": [stop, "never this"]} for stop in stops]
    asked = [(prompt, chosen) for prompt, chosen in zip(prompts, settings, strict=True)]
    asked += [(prompt, {"max_gen_toks": 12, "do_sample": False}) for prompt in prompts]
    judged = theirs.generate_until(requests("generate_until", asked), disable_tqdm=True)
    assert ours.generate_until(requests("generate_until", asked)) == judged
    assert judged[:4] != free


def test_a_task_that_samples_is_refused(ours: HarnessModel) -> None:
    with pytest.raises(Incompatible, match="samples its answers"):
        ours.generate_until(requests("generate_until", [("x", {"do_sample": True, "temperature": 0.7})]))


def test_a_row_serves_all_continuations_of_one_token(ours: HarnessModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    logits = ours.runtime.logits
    monkeypatch.setattr(ours.runtime, "logits", lambda ids: rows.append(len(ids)) or logits(ids))
    found = continuation_likelihoods(ours.runtime, [([5, 6, 7], [t]) for t in range(10, 20)], 320, Context())
    assert sum(rows) == 1
    assert len({f.log_probability for f in found}) == 10


def own_task(folder: Path, name: str = "village", **more: object) -> Path:
    """A multiple-choice task in a file, with local data, that asks our questions as we do."""
    data = folder / "village.jsonl"
    rows = [{"passage": q.passage, "question": q.question, "choices": list(q.choices), "answer": q.answer} for q in QUESTIONS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test",
        "output_type": "multiple_choice", "doc_to_text": "{{passage}}\nQuestion: {{question}}\nAnswer:", "doc_to_choice": "choices",
        "doc_to_target": "answer", "metadata": {"version": 3},
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm", "acc_bytes")], **more,
    }  # fmt: skip
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def test_our_multiple_choice_scorer_agrees_with_the_harness_item_by_item(ours: HarnessModel, tmp_path: Path) -> None:
    findings = evaluate_tasks(ours, find_tasks((str(own_task(tmp_path)),)), limit=None, num_fewshot=None)
    correct = multiple_choice(ours.runtime, ours.tokenizer, QUESTIONS, Context()).correct
    assert findings.items["harness.village.acc_bytes"].sums == tuple(map(float, correct))
    assert findings.items["harness.village.acc_norm"].sums == tuple(map(float, correct))  # characters are bytes here
    assert 0 < sum(correct) < len(correct)
    assert findings.metrics["harness.village.acc_bytes"] == sum(correct) / len(correct)


def test_results_have_counts_versions_and_standard_errors(ours: HarnessModel, tmp_path: Path) -> None:
    findings = evaluate_tasks(ours, find_tasks((str(own_task(tmp_path)),)), limit=4, num_fewshot=None)
    assert findings.metrics["harness.village.count"] == 4
    share = findings.metrics["harness.village.acc"]
    assert findings.metrics["harness.village.acc_stderr"] == pytest.approx((share * (1 - share) / 3) ** 0.5)
    assert findings.details == {"harness": {"village": {"version": 3, "count": 4, "num_fewshot": 0}}}


def test_few_shot_examples_change_the_prompt(ours: HarnessModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    longest: list[int] = []
    logits = ours.runtime.logits
    monkeypatch.setattr(ours.runtime, "logits", lambda ids: longest.append(ids.shape[1]) or logits(ids))
    tasks = find_tasks((str(own_task(tmp_path, fewshot_split="test")),))
    evaluate_tasks(ours, tasks, limit=2, num_fewshot=0)
    zero = max(longest)
    findings = evaluate_tasks(ours, tasks, limit=2, num_fewshot=1)
    assert max(longest) > zero
    assert findings.details["harness"]["village"]["num_fewshot"] == 1


def test_names_are_found_and_unknown_ones_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (hellaswag,) = find_tasks(("hellaswag",))
    assert hellaswag.file is not None
    assert hellaswag.file.name == "hellaswag.yaml"
    index = {"hellaswag_de": None, "mmlu": None}
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda: type("Index", (), {"task_index": index}))
    assert find_tasks(("mmlu",)) == [Task("mmlu", None)]
    with pytest.raises(UnusableData, match="no task 'hellaswag_d'; did you mean hellaswag_de"):
        find_tasks(("hellaswag_d",))
    with pytest.raises(UnusableData, match="no task file"):
        find_tasks((str(tmp_path / "none.yaml"),))


def test_files_of_tasks_are_checked(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(UnusableData, match="no task file"):
        find_tasks((str(tmp_path / "list.yaml"),))
    (tmp_path / "nameless.yaml").write_text("dataset_path: json\n")
    with pytest.raises(UnusableData, match="needs `task:`"):
        find_tasks((str(tmp_path / "nameless.yaml"),))
    gone = own_task(tmp_path, dataset_kwargs={"data_files": {"test": "gone.jsonl"}})
    with pytest.raises(UnusableData, match=r"there is no file .*gone\.jsonl"):
        check_tasks((str(gone),))


def test_a_hub_task_is_refused_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/nowhere")
    with pytest.raises(UnusableData, match="the data of the task hellaswag cannot be reached.*HF_HUB_OFFLINE"):
        check_tasks(("hellaswag",))


def test_the_fingerprint_covers_task_data_and_code_but_no_place(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        own_task(folder, dataset_kwargs={"data_files": {"test": str(folder / "village.jsonl")}})
    first = fingerprint_tasks((str(one / "village.yaml"),))
    assert fingerprint_tasks((str(two / "village.yaml"),)) == first
    (two / "utils.py").write_text("x = 1\n")
    with_code = fingerprint_tasks((str(two / "village.yaml"),))
    with (two / "village.jsonl").open("a") as stream:
        stream.write("{}\n")
    with_data = fingerprint_tasks((str(two / "village.yaml"),))
    own_task(one, doc_to_text="{{question}}")
    assert len({json.dumps(f) for f in (first, with_code, with_data, fingerprint_tasks((str(one / "village.yaml"),)))}) == 4
