"""lm-evaluation-harness over our runtimes, judged by the harness's own Hugging Face model, and our multiple-choice scorer by the harness."""

import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from compression.checkpoints.loading import load_model, load_tokenizer
from compression.context import Context
from compression.data import encode_choices, prompt
from compression.errors import Incompatible, UnusableData
from compression.evaluation import harness_tasks
from compression.evaluation.harness import HarnessModel, evaluate_tasks
from compression.evaluation.harness_tasks import Task, check_tasks, find_tasks, fingerprint_task, metric_name, task_metrics
from compression.evaluation.likelihood import continuation_likelihoods
from compression.evaluation.scorers import multiple_choice
from compression.evaluation.transformers_runtime import TransformersRuntime
from compression.reference.world import Question
from export.runtimes import open_text
from tests.tiny import tiny_tokenizer

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


def test_a_tokenizer_that_appends_eos_changes_no_score(ours: HarnessModel, theirs: HFLM) -> None:
    appending = HarnessModel(ours.runtime, tiny_tokenizer(eos=True), ours.text, Context())
    judged = theirs.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    found = appending.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    assert [likelihood for likelihood, _ in found] == pytest.approx([likelihood for likelihood, _ in judged], rel=1e-5)
    assert appending.tok_encode("The lamp") == theirs.tok_encode("The lamp")


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>{{ '\\n' }}",  # ends in a blank
        "{% for m in messages %}[{{ m.content }}]{% endfor %} answer: ",  # without begin-of-text
    ],
)
def test_questions_are_divided_as_the_harness_divides_them(theirs: HFLM, template: str | None) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    melting = Question("", "Where", ("re is", "s the"), 0)  # the answer merges with the end of the prompt
    for question in [*QUESTIONS, melting]:
        blank = " " if template is None else ""
        expected = [theirs._encode_pair(prompt(question, tokenizer), blank + choice) for choice in question.choices]
        assert encode_choices(tokenizer, question) == expected


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


@pytest.mark.parametrize("settings", [{"do_sample": True, "temperature": 0.7}, {"do_sample": True}, {"temperature": 0.7}])
def test_a_task_that_samples_is_refused(ours: HarnessModel, tmp_path: Path, settings: dict[str, object]) -> None:
    with pytest.raises(Incompatible, match="samples its answers"):
        ours.generate_until(requests("generate_until", [("x", settings)]))
    with pytest.raises(Incompatible, match="the task village samples its answers"):
        check_tasks((str(own_task(tmp_path, output_type="generate_until", generation_kwargs=settings)),), 512)


def test_a_task_that_writes_more_than_fits_is_refused_before_any_work(tmp_path: Path) -> None:
    task = str(own_task(tmp_path, output_type="generate_until"))  # says nothing: the harness's 256
    check_tasks((task,), 512)
    with pytest.raises(Incompatible, match="the task village writes up to 256 tokens"):
        check_tasks((task,), 256)
    own_task(tmp_path, output_type="generate_until", generation_kwargs={"max_tokens": 600, "until": []})
    with pytest.raises(Incompatible, match="up to 600 tokens"):
        check_tasks((task,), 512)


def test_all_names_of_the_token_limit_count_and_an_empty_stop_stops_nothing(ours: HarnessModel, theirs: HFLM) -> None:
    asked = requests(
        "generate_until", [("Dalo owns", {name: tokens}) for name, tokens in (("max_tokens", 5), ("max_completion_tokens", 7))]
    )
    written = ours.generate_until(asked)
    assert written == theirs.generate_until(asked, disable_tqdm=True)
    assert 0 < len(written[0]) < len(written[1])
    assert ours.generate_until(requests("generate_until", [("Dalo owns", {"max_gen_toks": 7, "until": [""]})])) == written[1:]


def test_a_row_serves_all_continuations_of_one_token(ours: HarnessModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    logits = ours.runtime.logits
    monkeypatch.setattr(ours.runtime, "logits", lambda ids: rows.append(len(ids)) or logits(ids))
    found = continuation_likelihoods(ours.runtime, [([5, 6, 7], [t]) for t in range(10, 20)], Context())
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
    assert findings.details == {"harness.village": {"version": 3, "count": 4, "num_fewshot": 0}}


def test_few_shot_examples_change_the_prompt(ours: HarnessModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    longest: list[int] = []
    logits = ours.runtime.logits
    monkeypatch.setattr(ours.runtime, "logits", lambda ids: longest.append(ids.shape[1]) or logits(ids))
    tasks = find_tasks((str(own_task(tmp_path, fewshot_split="test")),))
    evaluate_tasks(ours, tasks, limit=2, num_fewshot=0)
    zero = max(longest)
    findings = evaluate_tasks(ours, tasks, limit=2, num_fewshot=1)
    assert max(longest) > zero
    assert findings.details["harness.village"]["num_fewshot"] == 1


def test_a_task_that_shuffles_is_what_the_harness_makes_of_it(
    ours: HarnessModel, theirs: HFLM, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some tasks (GPQA's) draw the order of their choices from the global generators, which lm_eval.simple_evaluate seeds."""
    shuffle = """
import random

def shuffled(data):
    def one(row):
        choices = list(row["choices"])
        random.shuffle(choices)
        return {**row, "choices": choices, "answer": choices.index(row["choices"][row["answer"]])}
    return data.map(one)
"""
    (tmp_path / "utils.py").write_text(shuffle)
    file = own_task(tmp_path)
    file.write_text(file.read_text() + "process_docs: !function utils.shuffled\n")
    seen = []
    for run in range(2):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("fresh"))
        random.seed(run)
        seen.append(evaluate_tasks(ours, find_tasks((str(file),)), limit=None, num_fewshot=None))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("fresh"))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    judged = simple_evaluate(theirs, tasks=["village"], task_manager=manager)
    assert judged is not None
    answers = [sample["doc"]["answer"] for sample in judged["samples"]["village"]]
    assert answers != [q.answer for q in QUESTIONS]  # it did shuffle
    columns = [findings.items["harness.village.acc_bytes"].sums for findings in seen]
    assert columns[0] == columns[1] == tuple(sample["acc_bytes"] for sample in judged["samples"]["village"])


def test_chat_questions_are_scored_as_the_harness_does(theirs: HFLM, ours: HarnessModel, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>{{ '\\n' }}"
    chatty = HFLM(pretrained=theirs.model, tokenizer=tokenizer, batch_size=4, max_length=128, device="cpu")
    own_task(tmp_path)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    judged = simple_evaluate(
        chatty, tasks=["village"], task_manager=manager, apply_chat_template=True, system_instruction="Answer briefly."
    )
    assert judged is not None
    correct = multiple_choice(ours.runtime, tokenizer, QUESTIONS, Context(), system="Answer briefly.").correct
    assert correct == tuple(bool(sample["acc_bytes"]) for sample in judged["samples"]["village"])


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def test_chat_prompts_are_those_of_the_harness(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = load_tokenizer(tmp_path / "model")
    runtime = TransformersRuntime(tmp_path / "model", threads=1)
    chatty = HarnessModel(runtime, tokenizer, open_text(tmp_path / "model", runtime), Context())
    theirs = HFLM(pretrained=load_model(checkpoint), tokenizer=tokenizer, batch_size=4, max_length=128, device="cpu")
    file = own_task(tmp_path, fewshot_split="test", doc_to_text="{{question}}")
    found = evaluate_tasks(chatty, find_tasks((str(file),)), limit=None, num_fewshot=1, chat=True)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    judged = simple_evaluate(theirs, tasks=["village"], task_manager=manager, num_fewshot=1, apply_chat_template=True)
    assert judged is not None
    samples = judged["samples"]["village"]
    assert samples[0]["arguments"][0][0].startswith("<user>") and samples[0]["arguments"][0][0].count("<assistant>") == 2
    for metric in ("acc", "acc_norm", "acc_bytes"):
        assert found.items[f"harness.village.{metric}"].sums == tuple(sample[metric] for sample in samples)


def test_a_group_is_all_that_is_below_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {
        "all": {"group": "all", "task": ["some", {"task": "plain", "num_fewshot": 2}, {"group": "inline", "task": ["coded"]}]},
        "some": None,
        "plain": {"task": "plain", "dataset_path": "owner/one", "metric_list": [{"metric": "acc"}]},
        "tagged": {"task": "tagged", "dataset_path": "owner/two", "metric_list": [{"metric": "f1"}], "filter_list": [{"name": "x"}]},
        "coded": {"task": "coded", "class": "somewhere.Task"},
    }
    index = {name: SimpleNamespace(cfg=cfg, tags={"tagged"} if name == "some" else set()) for name, cfg in entries.items()}
    monkeypatch.setattr(harness_tasks, "_index", lambda: index)
    monkeypatch.setattr("compression.data.hub.resolve_commit", lambda path, _: f"commit of {path}")
    assert fingerprint_task("all") == [
        "all",
        "installed",
        [None, ["owner/one", None, "commit of owner/one"], ["owner/two", None, "commit of owner/two"]],
    ]
    assert task_metrics("all") == {
        "harness.tagged.*": None, "harness.plain.acc": "mean", "harness.plain.acc_stderr": None, "harness.plain.count": None,
        "harness.coded.*": None, "harness.all.*": None, "harness.inline.*": None,
    }  # fmt: skip


def test_standard_errors_end_names_and_filters_stand_before_them() -> None:
    assert metric_name("gsm8k", "exact_match_stderr", "strict-match") == "harness.gsm8k.exact_match.strict-match_stderr"
    assert metric_name("gsm8k", "exact_match", "none") == "harness.gsm8k.exact_match"


def test_names_are_found_and_unknown_ones_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (hellaswag,) = find_tasks(("hellaswag",))
    assert hellaswag.file is not None
    assert hellaswag.file.name == "hellaswag.yaml"
    monkeypatch.setattr(harness_tasks, "_index", lambda: {"hellaswag_de": None, "mmlu": None})
    assert find_tasks(("mmlu",)) == [Task("mmlu", None)]
    with pytest.raises(UnusableData, match="no task 'hellaswag_d'; did you mean 'hellaswag_de"):
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
        check_tasks((str(gone),), 128)


def test_a_hub_task_is_refused_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/nowhere")
    with pytest.raises(UnusableData, match="the data of the task hellaswag cannot be reached.*HF_HUB_OFFLINE"):
        check_tasks(("hellaswag",), 128)


def test_the_fingerprint_covers_task_data_and_code_but_no_place(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        own_task(folder, dataset_kwargs={"data_files": {"test": str(folder / "village.jsonl")}})
    first = fingerprint_task(str(one / "village.yaml"))
    assert fingerprint_task(str(two / "village.yaml")) == first
    (two / "utils.py").write_text("x = 1\n")
    with_code = fingerprint_task(str(two / "village.yaml"))
    with (two / "village.jsonl").open("a") as stream:
        stream.write("{}\n")
    with_data = fingerprint_task(str(two / "village.yaml"))
    own_task(one, doc_to_text="{{question}}")
    assert len({json.dumps(f) for f in (first, with_code, with_data, fingerprint_task(str(one / "village.yaml")))}) == 4
