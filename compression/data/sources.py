"""Reading, checking and fingerprinting what a `data:` section names. Imports no torch."""

import hashlib
import itertools
import json
import re
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from compression.data import hub
from compression.data.spec import DataSpec, QuestionSource, Source, Split, TextSource, outside
from compression.errors import UnusableData
from compression.reference import world
from compression.reference.world import Question

Use = Literal["training", "validation", "calibration", "evaluation"]
Record = dict[str, Any]
T = TypeVar("T")

QUESTIONS_VERSION = 2  # of how questions become tokens (rows.py): raise it when the same ones become others
EMBEDDED_DOCUMENTS = 4000
EMBEDDED_QUESTIONS = 2000
FORMATS = (".txt", ".jsonl", ".parquet")
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # how JSON writes half of a character beyond 16 bits; two of them are one
_CHECKED = 100  # records of each split that are looked at before any work; a later bad one is reported with its place

_DECIDES: dict[Use, tuple[tuple[Split, ...], tuple[str, ...]]] = {
    "training": (("train", "validation"), ("length", "train_documents", "train_questions")),
    "validation": (("validation",), ("length",)),  # of a training whose rows come from elsewhere
    "calibration": (("train",), ("length", "train_documents", "train_questions", "calibration_windows")),
    "evaluation": (("test",), ("length", "evaluation_windows", "evaluation_questions")),
}


def documents(spec: DataSpec, split: Split) -> list[str]:
    """The documents of a split, none of them blank, as many as the spec allows.

    Raises UnusableData: a file, column or split that is missing, or no document in it.
    """
    found = stream_documents(spec, split)
    if (source := outside(spec.text)) is None:
        return list(itertools.islice(found, EMBEDDED_DOCUMENTS if split != "train" else None))
    return _some(found, source, split, "text")


def stream_documents(spec: DataSpec, split: Split) -> Iterator[str]:
    """The same documents one by one, read as they are taken; those of the embedded world never end outside of training."""
    if (source := outside(spec.text)) is not None:
        return itertools.islice(_documents(source, split), spec.train_documents if split == "train" else None)
    return (
        world.documents(split) if split != "train" else itertools.islice(world.documents(split), spec.train_documents or EMBEDDED_DOCUMENTS)
    )


def running_text(source: TextSource, split: Split) -> str:
    """All text of a split as one string, nothing removed: .txt files verbatim, records joined with a blank line.

    This is the WikiText perplexity protocol of the GPTQ paper (arXiv 2210.17323): `"\\n\\n".join(records)`, empty ones too.
    """
    files = [] if hub.is_hub_id(source.path) else _files(source, split)
    if Path(source.path).is_file() or not files:
        pieces = list(_texts(source, split))
    else:
        pieces = [p for f in files for p in ([_read(f)] if f.suffix == ".txt" else _file_texts(f, source.column))]
    return "\n\n".join(pieces)


def questions(spec: DataSpec, split: Split) -> list[Question]:
    """The multiple-choice items of a split, as many as the spec allows; empty when the spec names none.

    Raises UnusableData: a file or split that is missing or empty, or an item of another shape, with its place.
    """
    if spec.questions is None:
        return []
    limit = spec.train_questions if split == "train" else spec.evaluation_questions
    if (source := outside(spec.questions)) is None:
        return list(itertools.islice(world.questions(split), limit or EMBEDDED_QUESTIONS))
    return _some(itertools.islice(_questions(source, split), limit), source, split, "questions")


def check_data(spec: DataSpec) -> None:
    """Refuse what cannot be read, before any work: looks at the beginning of every split that the spec names, and for its characters at all of a file.

    Raises UnusableData: no such file or data set, split or column, nothing in it, items of another shape, or characters that no text can hold.
    """
    if (text := outside(spec.text)) is not None:
        for split in (splits := _named_splits(text, ("train", "test"), "text")):
            _some(itertools.islice(_documents(text, split), _CHECKED), text, split, "text")
        _check_characters(text, splits)
    if (asked := outside(spec.questions)) is not None:
        for split in (splits := _named_splits(asked, ("test",), "questions")):
            _some(itertools.islice(_questions(asked, split), _CHECKED), asked, split, "questions")
        _check_characters(asked, splits)


def lone_documents(spec: DataSpec, split: Split) -> list[Path]:
    """The .txt files of a split that hold one document longer than several rows: blank lines, which end documents, may be missing."""
    source = outside(spec.text)
    if source is None or hub.is_hub_id(source.path):
        return []
    return [
        file
        for file in _files(source, split)
        if file.suffix == ".txt" and len(found := list(_file_texts(file, ""))) == 1 and len(found[0].split()) > 4 * spec.length
    ]


def _some(found: Iterable[T], source: Source, split: Split, what: Literal["text", "questions"]) -> list[T]:
    """All of them. Raises UnusableData where there is none."""
    kept = list(found)
    if not kept:
        raise UnusableData(f"{source.path}: the split {split!r} holds no {what}{_why_none(Path(source.path), split)}", key=what)
    return kept


def _why_none(path: Path, split: Split) -> str:
    """Of a file that is divided by itself what it lacks."""
    if not path.is_file():
        return ""
    parts = "one file is divided by its records, 90% train, 5% validation, 5% test"
    if path.suffix == ".txt":
        return f"; {parts}, and the documents of a .txt file end at blank lines: add blank lines, or give a directory with {split}.txt"
    return f"; {parts}, of which it has too few: give more, or a directory with {split}{path.suffix}"


def _check_characters(source: Source, splits: list[Split]) -> None:
    """Read local files whole: one bad line would stop a stage in its middle."""
    files = [] if hub.is_hub_id(source.path) else [file for split in splits for file in _files(source, split)]
    for file in dict.fromkeys(files):
        if file.suffix == ".jsonl":
            for number, line in enumerate(_lines(file), 1):
                if _HALF.search(line):
                    _parse(line, f"{file}:{number}")
        elif file.suffix == ".txt":
            _read(file)


def pinned(spec: DataSpec) -> DataSpec:
    """The same with the commits that its hub data sets stand for now: what a run reads, whatever the hub has meanwhile.

    Raises UnusableData for a data set or revision out of reach.
    """
    commits = {
        name: source.model_copy(update={"revision": hub.resolve_commit(source.path, source.revision)})
        for name, source in (("text", outside(spec.text)), ("questions", outside(spec.questions)))
        if source is not None and hub.is_hub_id(source.path)
    }
    return spec.model_copy(update=commits)


def fingerprint(spec: DataSpec, use: Use | None = None) -> str:
    """sha256 of what the data says, wherever it lies: file contents, the hub commit, the generator's version and a sample of it.

    use  cover only the splits and sizes that decide training, calibration or evaluation; None covers all of them
    Raises UnusableData as `check_data` does for files that are missing.
    """
    uses = tuple(_DECIDES) if use is None else (use,)
    splits = sorted({split for u in uses for split in _DECIDES[u][0]})
    sizes = sorted({name for u in uses for name in _DECIDES[u][1]})
    parts: dict[str, Any] = {name: getattr(spec, name) for name in sizes}
    parts["text"] = _identify(spec.text, splits)
    if spec.questions is not None:
        parts["questions"] = [QUESTIONS_VERSION, spec.system, _identify(spec.questions, splits)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _identify(named: Literal["embedded"] | Source, splits: list[Split]) -> Any:
    if (source := outside(named)) is None:
        sample = [[*itertools.islice(world.documents(s), 8), *map(repr, itertools.islice(world.questions(s), 8))] for s in splits]
        return ["world", world.VERSION, hashlib.sha256(json.dumps(sample).encode()).hexdigest(), EMBEDDED_DOCUMENTS, EMBEDDED_QUESTIONS]
    column = getattr(source, "column", None)
    if hub.is_hub_id(source.path):
        return ["hub", source.path, source.config, hub.resolve_commit(source.path, source.revision), _split_names(source, splits), column]
    if Path(source.path).is_file():
        return ["file", _digest(Path(source.path)), column]
    present = [s for s in splits if _has_split(source, s)]
    return ["files", {s: [[f.suffix, _digest(f)] for f in _files(source, s)] for s in present}, column]


def _digest(file: Path) -> str:
    """sha256 of what is read of a file: a byte order mark is not."""
    with file.open("rb") as stream:
        if stream.read(len(BOM_UTF8)) != BOM_UTF8 or file.suffix == ".parquet":
            stream.seek(0)
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _split_names(source: Source, splits: list[Split]) -> dict[Split, str]:
    return {s: (source.splits or {}).get(s, s) for s in splits}


def _named_splits(source: Source, needed: tuple[Split, ...], key: str) -> list[Split]:
    missing = [s for s in needed if source.splits is not None and s not in source.splits]
    if missing:
        raise UnusableData(f"{key}: splits names no {missing[0]}; give one: splits: {{{missing[0]}: ...}}", key="splits")
    return list(source.splits or needed)


def _has_split(source: Source, split: Split) -> bool:
    if source.splits is not None:
        return split in source.splits
    return split != "validation" or bool(_candidates(Path(source.path), split))


def _candidates(directory: Path, name: str) -> list[Path]:
    """Files of a directory that hold a split: the file itself, `name.ext`, shards `name-*.ext`, or a folder of them."""
    exact = directory / name
    if exact.is_file():
        return [exact]
    if exact.is_dir():
        return sorted(f for f in exact.iterdir() if f.suffix in FORMATS)
    return sorted(f for e in FORMATS for f in (*directory.glob(f"{name}{e}"), *directory.glob(f"{name}-*{e}")))


def _files(source: Source, split: Split) -> list[Path]:
    path = Path(source.path)
    if path.is_file():
        if source.splits is not None:
            raise UnusableData(f"{path} is one file, which is divided by itself; splits wants a directory or a hub data set", key="splits")
        return [_known_format(path)]
    if not path.is_dir():
        raise UnusableData(f"there is no file or directory {path}", key="path")
    if source.splits is not None and split not in source.splits:
        raise UnusableData(f"{path}: splits names no {split}; give one: splits: {{{split}: ...}}", key="splits")
    name = (source.splits or {}).get(split, split)
    found = _candidates(path, name)
    if not found:
        raise UnusableData(
            f"{path} has no split {name!r}: looked for {name}, {', '.join(name + e for e in FORMATS)} and a folder {name}/", key="splits"
        )
    return [_known_format(f) for f in found]


def _known_format(file: Path) -> Path:
    if file.suffix not in FORMATS:
        raise UnusableData(f"{file} has an unknown format; one of {', '.join(FORMATS)} is needed", key="path")
    return file


def _share(text: str) -> Split:
    """Split of a record of a file that has none: the same on every machine, and equal texts are never divided."""
    share = hashlib.sha256(text.encode()).digest()[0] / 256
    return "train" if share < 0.9 else "validation" if share < 0.95 else "test"


def _documents(source: TextSource, split: Split) -> Iterator[str]:
    return (text for text in _texts(source, split) if text.strip())


def _texts(source: TextSource, split: Split) -> Iterator[str]:
    if hub.is_hub_id(source.path):
        for record in hub.records(source, split, (source.column,)):
            yield _text_of(record, source.column, source.path)
        return
    single = Path(source.path).is_file()
    for file in _files(source, split):
        for text in _file_texts(file, source.column):
            if not single or _share(text) == split:
                yield text


def _file_texts(file: Path, column: str) -> Iterator[str]:
    if file.suffix == ".txt":
        yield from re.split(r"\n[ \t\r]*\n", _read(file))
        return
    for place, record in file_records(file, (column,)):
        yield _text_of(record, column, place)


def _text_of(record: Record, column: str, place: str) -> str:
    if column not in record:
        raise UnusableData(f"{place}: there is no column {column!r}; there are: {', '.join(record)}", key="column")
    if not isinstance(record[column], str):
        raise UnusableData(f"{place}: the column {column!r} holds {type(record[column]).__name__}, not text", key="column")
    return record[column]


def _questions(source: QuestionSource, split: Split) -> Iterator[Question]:
    if hub.is_hub_id(source.path):
        for record in hub.records(source, split, ("question", "choices", "answerKey")):
            yield _question_of(record, source.path)
        return
    single = Path(source.path).is_file()
    for file in _files(source, split):
        if file.suffix == ".txt":
            raise UnusableData(f"{file}: questions are read from .jsonl or .parquet, not from .txt", key="questions")
        for place, record in file_records(file, None):
            question = _question_of(record, place)
            if not single or _share(question.passage + question.question) == split:
                yield question


def _question_of(record: Record, place: str) -> Question:
    """Raises UnusableData for an item that is not CommonsenseQA's shape or has no answer among its choices."""
    shape = "question, choices {label, text}, answerKey and optionally passage"
    choices = record.get("choices")
    if not isinstance(record.get("question"), str) or not isinstance(choices, dict) or "answerKey" not in record:
        raise UnusableData(f"{place}: a question needs {shape}; found: {', '.join(record)}", key="questions")
    labels, texts = choices.get("label"), choices.get("text")
    if not isinstance(labels, list) or not isinstance(texts, list) or len(labels) != len(texts) or len(texts) < 2:
        raise UnusableData(f"{place}: choices needs two lists of equal length, label and text, with two entries or more", key="questions")
    if not all(isinstance(t, str) and t for t in texts):
        raise UnusableData(f"{place}: every choice must be a text that is not empty", key="questions")
    if record["answerKey"] not in labels:
        hint = "; the hub's test splits often hide their answers: take splits: {test: validation}" if not record["answerKey"] else ""
        raise UnusableData(
            f"{place}: the answerKey {record['answerKey']!r} is none of {', '.join(map(str, labels))}{hint}", key="questions"
        )
    return Question(record.get("passage") or "", record["question"], tuple(texts), labels.index(record["answerKey"]))


def file_records(file: Path, columns: tuple[str, ...] | None) -> Iterator[tuple[str, Record]]:
    """(place, record) of a .jsonl or .parquet file; `columns` are the only ones read from parquet, None for all."""
    if file.suffix == ".jsonl":
        for number, line in enumerate(_lines(file), 1):
            if line.strip():
                yield f"{file}:{number}", _parse(line, f"{file}:{number}")
        return
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UnusableData(f"{file} is no readable parquet file: {error}", key="path") from None
    missing = [c for c in columns or () if c not in table.schema_arrow.names]
    if missing:
        raise UnusableData(f"{file}: there is no column {missing[0]!r}; there are: {', '.join(table.schema_arrow.names)}", key="column")
    row = 0
    for batch in table.iter_batches(columns=list(columns) if columns else None):
        try:
            found = batch.to_pylist()
        except UnicodeDecodeError as error:
            raise UnusableData(f"{file}: a text behind row {row} is not UTF-8: {error}", key="path") from None
        for record in found:
            row += 1
            yield f"{file}, row {row}", record


def _parse(line: str, place: str) -> Record:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UnusableData(f"{place}: not JSON: {error}", key="path") from None
    if not isinstance(record, dict):
        raise UnusableData(f"{place}: a line must be a JSON object, not {type(record).__name__}", key="path")
    if _HALF.search(line) and (half := re.search("[\ud800-\udfff]", json.dumps(record, ensure_ascii=False))):
        raise UnusableData(
            f"{place}: \\u{ord(half[0]):x} is half a character (an emoji cut in two?), which no text can hold; remove it, or write \\ufffd in its place",
            key="path",
        )
    return record


def _lines(file: Path) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8-sig") as stream:  # without a byte order mark
            yield from stream
    except UnicodeDecodeError:
        _refuse_bytes(file)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        _refuse_bytes(file)


def _refuse_bytes(file: Path) -> NoReturn:
    """Raises UnusableData for the first line of a file that is not UTF-8."""
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if number == 1 and line.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
                raise UnusableData(f"{file} is UTF-16; save it as UTF-8", key="path")
            try:
                line.decode()
            except UnicodeDecodeError as error:
                half = line[error.start] == 0xED  # how half a character would be written
                remedy = "half a character stands there: remove it" if half else "save it as UTF-8, or replace what is damaged"
                raise UnusableData(f"{file}:{number} is not UTF-8 (byte {error.start + 1} of the line); {remedy}", key="path") from None
    raise UnusableData(f"{file} changed while it was read", key="path")
