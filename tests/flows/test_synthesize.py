"""A corpus in a whole run, as a user starts it: written, trained on, shown, logged, linked, and taken from the store the second time."""

import json
from pathlib import Path

import pytest
from mlflow.entities import Run

from tests.flows.recipes import recipe
from tests.flows.workshop import Finished, Workshop

STAGES = """\
  corpus: {uses: synthesize, documents: 24, length: 32, batch_size: 8}
  pruned: {uses: prune.width, needs: base, keep: 0.5}
  distilled: {uses: distill, steps: 2, batch_size: 2, corpus: corpus}
"""
GATES = "gates: {corpus: {documents: {min: 24}}}\n"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Workshop:
    made = Workshop(tmp_path_factory.mktemp("synthesize") / "whole", checkpoint)
    (made.folder / "micro.yaml").write_text(recipe(checkpoint, STAGES, GATES))
    return made


@pytest.fixture(scope="module")
def first(workshop: Workshop) -> Finished:
    return workshop.run()


@pytest.fixture(scope="module")
def runs(workshop: Workshop, first: Finished) -> tuple[Run, dict[str, Run]]:
    return workshop.latest()


@pytest.fixture(scope="module")
def more(workshop: Workshop, runs: object) -> Finished:
    """The same with a larger corpus, which the gate cannot know."""
    return workshop.run("stages.corpus.documents=25")


def test_a_corpus_is_written_and_trained_on(workshop: Workshop, first: Finished) -> None:
    assert first.code == 0, first.err
    assert first.states() == dict.fromkeys(["base", "corpus", "pruned", "distilled"], "Completed")
    row, linked = first.rows["corpus"], workshop.folder / "outputs" / "micro" / "corpus"
    assert linked.resolve() == Path(row["path"]) and (linked / "corpus.json").is_file()
    texts = [json.loads(line)["text"] for line in (linked / "corpus.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(texts) == len(set(texts)) == row["metrics"]["documents"] == 24
    assert row["runtime"] == "" and row["measure_seconds"] == 0
    assert row["metrics"].keys() == {"documents", "tokens", "sampled", "duplicates", "too_short", "cut", "size_mb", "seconds"}
    assert first.rows["distilled"]["needs"] == ["pruned", "corpus", "base"]
    assert [verdict["outcome"] for verdict in row["verdicts"]] == ["PASS"]


def test_the_table_the_page_and_mlflow_show_it(workshop: Workshop, first: Finished, runs: tuple[Run, dict[str, Run]]) -> None:
    assert "documents" in first.out
    (line,) = (line for line in first.out.splitlines() if line.strip(" │").startswith("corpus") and "│" in line)
    assert "24" in line
    page = (workshop.folder / "outputs" / "micro" / "report.html").read_text()
    assert "<td>24</td>" in page and "synthesize: completed" in page
    run = runs[1]["corpus"]
    assert run.info.status == "FINISHED" and run.data.metrics["documents"] == 24 and "perplexity" not in run.data.metrics


def test_a_changed_corpus_runs_only_what_reads_it(first: Finished, more: Finished) -> None:
    assert more.code == 0, more.err
    assert more.states() == {"base": "Cached", "corpus": "Completed", "pruned": "Cached", "distilled": "Completed"}
    assert more.rows["corpus"]["metrics"]["documents"] == 25
    assert more.rows["distilled"]["content"] != first.rows["distilled"]["content"]
