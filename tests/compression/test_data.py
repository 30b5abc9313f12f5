import json
import re
import subprocess
import sys
from itertools import chain, pairwise
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from compression.data import (
    DataSpec,
    QuestionSource,
    TextSource,
    calibration_windows,
    check_data,
    documents,
    encode_choices,
    evaluation_windows,
    fingerprint,
    pinned,
    prompt,
    question_rows,
    questions,
    training_rows,
)
from compression.data.hub import hub_failure
from compression.data.rows import encode_document, pack
from compression.data.sources import lone_documents, running_text
from compression.errors import UnusableData
from compression.reference.world import Question
from tests.tiny import tiny_tokenizer

CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TEXTS = ["The lamp is in the mill.", "Dalo owns the kettle.", "At noon Pemir\nwent to the tower."]
ITEM = {"question": "Where is it?", "choices": {"label": ["A", "B", "C"], "text": ["mill", "barn", "old tower"]}, "answerKey": "C"}


def write(path: Path, records: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".txt":
        path.write_text("\n\n".join(records))
        return path
    rows = [{"text": r} if isinstance(r, str) else r for r in records]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    return path


def text_spec(path: Path, splits: dict | None = None, **more: object) -> DataSpec:
    return DataSpec.model_validate({"text": {"path": str(path), "splits": splits}, **more})


def question_spec(path: Path, splits: dict | None = None) -> DataSpec:
    return DataSpec.model_validate({"text": "embedded", "questions": {"path": str(path), "splits": splits}})


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write(tmp_path / "train.jsonl", TEXTS * 40)
    write(tmp_path / "test.txt", TEXTS * 10)
    return tmp_path


def test_importing_data_takes_no_torch() -> None:
    code = "import sys, compression.data as d; d.fingerprint(d.DataSpec.model_validate('embedded')); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_embedded_stands_for_text_and_questions_and_schema_says_so() -> None:
    sizes = {
        "length": 384,
        "evaluation_windows": 32,
        "evaluation_questions": 120,
    }  # the rows the reference model was trained on; a quick look
    assert DataSpec.model_validate("embedded") == DataSpec(text="embedded", questions="embedded", **sizes)
    assert {"const": "embedded"} in DataSpec.model_json_schema()["anyOf"]
    for wrong in ("embeded", {"length": 64}, {"text": "embedded", "lenght": 64}, {"text": {"path": "a", "splits": {"dev": "x"}}}):
        with pytest.raises(ValidationError):
            DataSpec.model_validate(wrong)


def test_embedded_sizes() -> None:
    spec = DataSpec(text="embedded", questions="embedded", train_documents=5, evaluation_questions=3, train_questions=4)
    assert (len(documents(spec, "train")), len(questions(spec, "test")), len(questions(spec, "train"))) == (5, 3, 4)
    assert documents(spec, "train") == documents(DataSpec(text="embedded", train_documents=8), "train")[:5]
    assert questions(DataSpec(text="embedded"), "test") == []


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_every_format_reads_the_same_documents(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / f"train{suffix}", TEXTS)
    write(tmp_path / f"test{suffix}", TEXTS[:1])
    spec = text_spec(tmp_path)
    check_data(spec)
    assert documents(spec, "train") == TEXTS
    assert documents(spec, "test") == TEXTS[:1]
    assert documents(text_spec(tmp_path, train_documents=2), "train") == TEXTS[:2]


def test_splits_are_files_folders_or_shards(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", TEXTS[:1])
    write(tmp_path / "folder" / "x.txt", TEXTS[1:2])
    write(tmp_path / "dev-00000-of-00002.parquet", TEXTS[:1])
    write(tmp_path / "dev-00001-of-00002.parquet", TEXTS[1:])
    spec = text_spec(tmp_path, {"train": "a.jsonl", "validation": "dev", "test": "folder"})
    check_data(spec)
    assert [documents(spec, s) for s in ("train", "validation", "test")] == [TEXTS[:1], TEXTS, TEXTS[1:2]]


def test_a_single_file_is_divided_the_same_way_every_time(tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(1000)]
    found = {s: documents(text_spec(write(tmp_path / "all.jsonl", texts)), s) for s in ("train", "validation", "test")}
    assert sorted(chain(*found.values())) == sorted(texts)
    assert 850 < len(found["train"]) < 950
    assert found["test"] == documents(text_spec(write(tmp_path / "again.txt", texts)), "test")


def test_unusable_text_is_refused_before_any_work(tmp_path: Path) -> None:
    def refuses(spec: DataSpec, key: str, message: str) -> None:
        with pytest.raises(UnusableData, match=message) as caught:
            check_data(spec)
        assert caught.value.key == key

    write(tmp_path / "train.jsonl", [{"body": "x"}])
    write(tmp_path / "test.jsonl", TEXTS)
    refuses(text_spec(tmp_path), "column", "no column 'text'; there are: body")
    refuses(text_spec(tmp_path / "absent" / "corpus.txt"), "path", "no file or directory")
    refuses(text_spec(tmp_path, {"train": "test", "test": "dev"}), "splits", "no split 'dev'")
    refuses(text_spec(tmp_path, {"test": "test"}), "splits", "names no train")
    refuses(text_spec(tmp_path / "test.jsonl", {"train": "a", "test": "b"}), "splits", "is one file")
    refuses(text_spec(write(tmp_path / "blank.txt", ["", " \n", ""])), "text", "holds no text")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    refuses(text_spec(tmp_path, {"train": "broken.jsonl", "test": "test"}), "path", r"broken.jsonl:2: not JSON")
    (tmp_path / "list.jsonl").write_text("[1]\n")
    refuses(text_spec(tmp_path, {"train": "list.jsonl", "test": "test"}), "path", "must be a JSON object")
    (tmp_path / "false.parquet").write_text("no parquet")
    refuses(text_spec(tmp_path, {"train": "false.parquet", "test": "test"}), "path", "no readable parquet")
    (tmp_path / "latin.txt").write_bytes("Ünï".encode("latin-1"))
    refuses(text_spec(tmp_path, {"train": "latin.txt", "test": "test"}), "path", "not UTF-8")
    refuses(text_spec(write(tmp_path / "numbers.parquet", [{"text": 1}])), "column", "holds int, not text")
    refuses(text_spec(write(tmp_path / "other.parquet", [{"body": "x"}])), "column", "there are: body")
    refuses(text_spec(write(tmp_path / "corpus.csv", []).rename(tmp_path / "c.md")), "path", "unknown format")


def test_half_a_character_is_refused_with_its_place(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}) for text in TEXTS * 60]
    lines[150] = '{"text": "whole \\ud83d\\ude42, half \\ud83d"}'  # beyond the records that are looked at
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    spec = text_spec(tmp_path)
    for read in (check_data, lambda spec: documents(spec, "train")):
        with pytest.raises(UnusableData, match=r"train.jsonl:151: .*\\ud83d is half a character"):
            read(spec)
    asked = write(tmp_path / "q.jsonl", [ITEM | {"question": f"Where {number}?"} for number in range(60)])
    asked.write_text(asked.read_text() + json.dumps(ITEM | {"question": "\udd42?"}) + "\n")
    with pytest.raises(UnusableData, match=r"q.jsonl:61: "):
        check_data(question_spec(asked))
    (tmp_path / "test.txt").write_bytes(b"A line.\n\nHalf \xed\xa0\xbd of it.\n")
    with pytest.raises(UnusableData, match=r"test.txt:3 is not UTF-8 \(byte 6 of the line\); half a character"):
        check_data(text_spec(tmp_path, {"train": "test.txt", "test": "test.txt"}))
    (tmp_path / "test.txt").write_text("A line.", encoding="utf-16")
    with pytest.raises(UnusableData, match="is UTF-16"):
        check_data(text_spec(tmp_path, {"train": "test.txt", "test": "test.txt"}))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / f"train{suffix}", TEXTS)
    file = write(tmp_path / f"test{suffix}", TEXTS)
    spec = text_spec(tmp_path)
    before, text = fingerprint(spec), running_text(TextSource(path=str(tmp_path)), "test")
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    check_data(spec)
    assert documents(spec, "test") == TEXTS
    assert running_text(TextSource(path=str(tmp_path)), "test") == text
    assert fingerprint(spec) == before


def test_a_text_file_without_blank_lines(tmp_path: Path) -> None:
    file = tmp_path / "corpus.txt"
    file.write_text("The lamp is in the mill.\n" * 200)
    with pytest.raises(UnusableData, match="end at blank lines"):
        check_data(text_spec(file))
    for split in ("train", "test"):
        (tmp_path / f"{split}.txt").write_text("The lamp is in the mill.\n" * 200)
    assert lone_documents(text_spec(tmp_path, length=32), "train") == [tmp_path / "train.txt"]
    (tmp_path / "train.txt").write_text("The lamp is in the mill.\n\n" * 200)
    assert lone_documents(text_spec(tmp_path, length=32), "train") == []


def test_questions_in_commonsenseqa_shape(tmp_path: Path) -> None:
    wanted = [
        Question("", "Where is it?", ("mill", "barn", "old tower"), 2),
        Question("A passage.", "Where is it?", ("mill", "barn", "old tower"), 0),
    ]
    items = [ITEM | {"passage": None}, ITEM | {"passage": "A passage.", "answerKey": "A"}]
    write(tmp_path / "dev.jsonl", items)
    write(tmp_path / "dev.parquet", items)
    for name in ("dev.jsonl", "dev.parquet"):
        spec = question_spec(tmp_path, {"test": name})
        check_data(spec)
        assert questions(spec, "test") == wanted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answerKey": ""}, "hide their answers"),
        ({"answerKey": "E"}, "none of A, B, C"),
        ({"choices": ["a", "b"]}, "a question needs"),
        ({"choices": {"label": ["A"], "text": ["a"]}}, "two entries"),
        ({"choices": {"label": ["A", "B"], "text": ["a", ""]}}, "not empty"),
    ],
)
def test_a_question_of_another_shape_is_refused_with_its_place(tmp_path: Path, change: dict, message: str) -> None:
    write(tmp_path / "test.jsonl", [ITEM, ITEM | change])
    with pytest.raises(UnusableData, match=rf"test.jsonl:2: .*{message}"):
        check_data(question_spec(tmp_path, {"test": "test.jsonl"}))


def test_fingerprint_is_content_not_path_and_covers_what_decides(tmp_path: Path) -> None:
    for name in ("here", "there"):
        write(tmp_path / name / "train.jsonl", TEXTS)
        write(tmp_path / name / "test.jsonl", TEXTS)
    here, there = text_spec(tmp_path / "here"), text_spec(tmp_path / "there")
    before = {use: fingerprint(here, use) for use in ("training", "calibration", "evaluation", None)}
    assert before == {use: fingerprint(there, use) for use in before}
    assert len(set(before.values())) == 4
    write(tmp_path / "there" / "test.jsonl", [*TEXTS, "more"])
    assert {use for use in before if fingerprint(there, use) != before[use]} == {"evaluation", None}
    longer = here.model_copy(update={"evaluation_questions": 7})
    assert {use for use in before if fingerprint(longer, use) != before[use]} == {"evaluation", None}
    assert fingerprint(DataSpec.model_validate("embedded")) != fingerprint(DataSpec(text="embedded"))


@pytest.mark.parametrize(
    ("offline", "error", "reason"),
    [
        (True, ConnectionError("refused"), r"is switched off \(HF_HUB_OFFLINE is set\)"),
        (False, ConnectionError("refused"), "at http://hub.test cannot be reached: refused"),
        (False, huggingface_hub.errors.HFValidationError("Cannot have --"), "no name that the hub has"),
    ],
)
def test_a_hub_that_gives_nothing_says_why(monkeypatch: pytest.MonkeyPatch, offline: bool, error: Exception, reason: str) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", str(int(offline)))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://hub.test")
    without_snapshot = huggingface_hub.errors.LocalEntryNotFoundError("check your connection")
    without_snapshot.__cause__ = error
    assert re.search(reason, hub_failure(error)) and re.search(reason, hub_failure(without_snapshot))


def test_hub_data_sets_are_pinned_and_read_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "c" * 40
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    spec = text_spec(Path("some/corpus"), {"train": "train", "test": "dev"})
    with pytest.raises(UnusableData, match="HF_HUB_OFFLINE"):
        check_data(spec)
    (tmp_path / "datasets--some--corpus" / "refs").mkdir(parents=True)
    (tmp_path / "datasets--some--corpus" / "refs" / "main").write_text(commit)
    pinned = DataSpec.model_validate({"text": {"path": "some/corpus", "revision": commit, "splits": {"train": "train", "test": "dev"}}})
    assert fingerprint(spec) == fingerprint(pinned)

    write(tmp_path / "train.parquet", TEXTS)
    write(tmp_path / "dev.parquet", TEXTS[:2])
    load = datasets.load_dataset_builder
    files = {"train": str(tmp_path / "train.parquet"), "dev": str(tmp_path / "dev.parquet")}

    def opened(path: str, name: str | None, revision: str) -> object:
        assert (path, name, revision) == ("some/corpus", None, commit)
        return load("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset_builder", opened)
    check_data(spec)
    assert (documents(spec, "train"), documents(spec, "test")) == (TEXTS, TEXTS[:2])
    with pytest.raises(UnusableData, match="no column 'body'; there are: text"):
        check_data(DataSpec.model_validate({"text": {"path": "some/corpus", "column": "body"}}))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: SimpleNamespace(hash="d" * 40))
    with pytest.raises(UnusableData, match=r"only revision d+ is on this machine"):
        check_data(spec)


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 16))
def test_packed_rows_begin_with_documents_and_repeat_nothing(sizes: list[int], length: int) -> None:
    encoded = [[(number, place) for place in range(size)] for number, size in enumerate(sizes)]
    rows = list(pack(encoded, length))
    assert all(len(row) == length for row in rows)
    flat = list(chain(*rows))
    assert flat == sorted(set(flat))
    for row in rows:
        for (number, place), (next_number, next_place) in pairwise(row):
            inside = (next_number, next_place) == (number, place + 1)
            assert inside or (place == sizes[number] - 1 and (next_number, next_place) == (number + 1, 0))
        number, place = row[0]
        assert place == 0 or (number, place - 1) in flat  # a further row of a document that is longer than its row
    lost = [set(document) - set(flat) for document in encoded]
    assert all(len(tokens) < length for tokens in lost)


def test_training_rows_are_documents_between_bos_and_eos(corpus: Path) -> None:
    tokenizer = tiny_tokenizer()
    rows = training_rows(text_spec(corpus, length=48), tokenizer)
    assert rows.dtype == torch.int64
    assert rows.shape[1] == 48
    assert (rows[:, 0] == tokenizer.bos_token_id).all()
    assert tokenizer.decode(rows[0]).startswith(f"<s>{TEXTS[0]}</s><s>{TEXTS[1]}</s><s>")
    with pytest.raises(UnusableData, match="fills no row"):
        training_rows(text_spec(corpus, length=8192), tokenizer)


def test_documents_take_the_tokenizers_own_special_tokens() -> None:
    assert encode_document(tiny_tokenizer(bos=False), "lamp")[0] not in (0, 1)
    tokenizer = tiny_tokenizer()
    assert encode_document(tokenizer, "lamp") == [0, *tokenizer("lamp", add_special_tokens=False)["input_ids"], 1]
    tokenizer.eos_token = None
    assert encode_document(tokenizer, "lamp")[-1] != 1


def test_evaluation_windows_follow_the_wikitext_protocol(corpus: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokens = tokenizer("\n\n".join(TEXTS * 10))["input_ids"]
    windows = evaluation_windows(text_spec(corpus, length=32, evaluation_windows=1000), tokenizer)
    assert windows.flatten().tolist() == tokens[: len(tokens) // 32 * 32]
    assert len(evaluation_windows(text_spec(corpus, length=32, evaluation_windows=2), tokenizer)) == 2
    records = ["", " = Lamp = \n", "", " The lamp \n"]  # WikiText's raw rows: lines, empty ones too
    write(corpus / "rows.jsonl", records)
    windows = evaluation_windows(text_spec(corpus, {"train": "train", "test": "rows.jsonl"}, length=8), tokenizer)
    assert windows.flatten().tolist() == tokenizer("\n\n".join(records))["input_ids"][: windows.numel()]
    with pytest.raises(UnusableData, match="fills no window"):
        evaluation_windows(text_spec(corpus, length=8192), tokenizer)


def test_embedded_evaluation_windows_are_packed_documents_as_many_as_wanted() -> None:
    tokenizer = tiny_tokenizer()
    spec = DataSpec(text="embedded", evaluation_windows=20, length=64)
    windows = evaluation_windows(spec, tokenizer)
    assert windows.shape == (20, 64)
    assert windows[0, 0] == tokenizer.bos_token_id
    assert not set(documents(DataSpec(text="embedded", train_documents=50), "train")) & set(tokenizer.batch_decode(windows))


def test_calibration_windows_are_a_seeded_draw(corpus: Path) -> None:
    tokenizer, spec = tiny_tokenizer(), text_spec(corpus, length=32, calibration_windows=4)
    first = calibration_windows(spec, tokenizer, 0)
    assert first.shape == (4, 32)
    assert torch.equal(first, calibration_windows(spec, tokenizer, 0))
    assert not torch.equal(first, calibration_windows(spec, tokenizer, 1))
    with pytest.raises(UnusableData, match="fills only") as caught:
        calibration_windows(text_spec(corpus, length=32, calibration_windows=4000), tokenizer, 0)
    assert caught.value.key == "calibration_windows"


def test_the_prompt_is_a_users_turn_where_there_is_a_chat_template() -> None:
    question, plain, chat = Question("P.", "Q?", ("mill", "barn"), 1), tiny_tokenizer(), tiny_tokenizer()
    chat.chat_template = CHAT
    body = "P.\nQuestion: Q?\nAnswer:"
    assert prompt(question, plain) == body
    assert prompt(Question("", "Q?", ("a", "b"), 0), plain) == "Question: Q?\nAnswer:"
    assert prompt(question, chat) == f"<s>[user]{body}</s>[assistant]"
    for asked, answer in encode_choices(plain, question):
        assert plain.decode(asked + answer) in (f"<s>{body} mill", f"<s>{body} barn")
        assert asked == plain(body)["input_ids"]
    conversation = chat.apply_chat_template([{"role": "user", "content": body}], add_generation_prompt=True, return_dict=False)
    assert encode_choices(chat, question)[0] == (conversation, chat("mill", add_special_tokens=False)["input_ids"])


def test_what_a_tokenizer_appends_ends_no_prompt() -> None:
    spec = DataSpec(text="embedded", questions="embedded", train_questions=6, length=1024)
    plain, appending = tiny_tokenizer(), tiny_tokenizer(eos=True)
    for question in questions(spec, "train"):
        assert encode_choices(appending, question) == encode_choices(plain, question)
    for one, other in zip(question_rows(spec, appending), question_rows(spec, plain), strict=True):
        assert torch.equal(one, other)
    assert encode_document(appending, "lamp") == encode_document(plain, "lamp")


def test_an_answer_that_melts_into_its_prompt_is_encoded_alone() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder, alphabet = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["\nAnswer: mill"] * 20, trainer)
    reaching = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    (melted, other) = encode_choices(reaching, Question("", "Where?", ("mill", "barn"), 0))
    assert melted[0] == other[0] == reaching("Question: Where?\nAnswer:")["input_ids"]
    assert melted[1] == reaching(" mill")["input_ids"]
    assert reaching.decode(other[1]) == "barn"  # the blank went to a token with the prompt


def test_a_system_message_stands_before_every_question() -> None:
    spec = DataSpec.model_validate({"text": "embedded", "questions": {"path": "embedded", "system": "Be brief."}, "length": 1024})
    assert questions(spec, "test") == questions(DataSpec(text="embedded", questions="embedded"), "test")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    rows, _ = question_rows(spec.model_copy(update={"train_questions": 2}), tokenizer)
    assert all(text.startswith("<s>[system]Be brief.</s>[user]") for text in tokenizer.batch_decode(rows))
    assert fingerprint(spec) != fingerprint(DataSpec.model_validate({"text": "embedded", "questions": "embedded", "length": 1024}))


def test_rows_are_padded_with_a_token_that_exists() -> None:
    spec = DataSpec(text="embedded", questions="embedded", train_questions=6, length=1024)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    rows, mask = question_rows(spec, tokenizer)
    assert tokenizer.pad_token_id == 320 > rows.max()
    assert (rows[~mask] == tokenizer.eos_token_id).any()


def test_question_rows_mask_the_prompt() -> None:
    spec = DataSpec(text="embedded", questions="embedded", train_questions=6, length=1024)
    for template in (None, CHAT):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template
        rows, mask = question_rows(spec, tokenizer)
        assert rows.shape == mask.shape
        for row, answer, question in zip(rows, mask, questions(spec, "train"), strict=True):
            assert tokenizer.decode(row[answer]) == ("" if template else " ") + question.choices[question.answer] + "</s>"
            end = int(answer.nonzero().max()) + 1
            assert tokenizer.decode(row[:end]).removeprefix("<s>").startswith(prompt(question, tokenizer).removeprefix("<s>"))
            assert (row[end:] == tokenizer.pad_token_id).all()
    with pytest.raises(UnusableData, match="names no questions"):
        question_rows(DataSpec(text="embedded"), tiny_tokenizer())


@pytest.mark.parametrize("length", [12, 30, 64, 65, 66, 1000])
def test_long_questions_lose_the_beginning_of_their_prompt(tmp_path: Path, length: int) -> None:
    tokenizer = tiny_tokenizer()
    spec = question_spec(write(tmp_path / "q" / "train.jsonl", [ITEM | {"passage": "The lamp is in the mill. " * 4}]).parent)
    (whole,), (answer,) = question_rows(spec.model_copy(update={"length": 1000}), tokenizer)
    (cut,), (mask,) = question_rows(spec.model_copy(update={"length": length}), tokenizer)
    kept = min(length, len(whole))
    assert torch.equal(cut, whole[-kept:])
    assert torch.equal(mask, answer[-kept:])
    with pytest.raises(UnusableData, match="no room for its question"):
        question_rows(spec.model_copy(update={"length": int(answer.sum())}), tokenizer)


def test_an_instruction_model_is_calibrated_on_conversations_too() -> None:
    tokenizer = tiny_tokenizer()
    spec = DataSpec(text="embedded", questions="embedded", train_documents=20, train_questions=20, calibration_windows=8, length=1024)
    assert "[assistant]" not in "".join(tokenizer.batch_decode(calibration_windows(spec, tokenizer, 0)))
    tokenizer.chat_template = CHAT
    text = "".join(tokenizer.batch_decode(calibration_windows(spec, tokenizer, 0)))
    assert "[assistant]" in text
    assert "<s><s>" not in text


def test_hub_data_are_pinned_to_the_commits_they_stand_for_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compression.data.hub.resolve_commit", lambda path, revision: f"{path} at {revision}")
    spec = DataSpec.model_validate({"text": {"path": "owner/text", "revision": "v1"}, "questions": {"path": "owner/questions"}})
    found = pinned(spec)
    assert isinstance(found.text, TextSource) and found.text == TextSource(path="owner/text", revision="owner/text at v1")
    assert found.questions == QuestionSource(path="owner/questions", revision="owner/questions at None")
    assert pinned(DataSpec.model_validate("embedded")) == DataSpec.model_validate("embedded")
