"""A corpus in a run of the command line: written, trained on, shown, logged and linked."""

import json
from pathlib import Path

import pytest
from mlflow.entities import Run

from flows.planning import load_recipe, make_plan
from tasks.store.store import Store
from tests.flows.recipes import recipe
from tests.flows.workshop import Finished, Workshop

pytestmark = pytest.mark.slow
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


def test_table_page_and_mlflow_show_it(workshop: Workshop, first: Finished, runs: tuple[Run, dict[str, Run]]) -> None:
    assert "documents" in first.out
    (line,) = (line for line in first.out.splitlines() if line.strip(" │").startswith("corpus") and "│" in line)
    assert "24" in line
    page = (workshop.folder / "outputs" / "micro" / "report.html").read_text()
    assert "<td>24</td>" in page and "synthesize: completed" in page
    run = runs[1]["corpus"]
    assert run.info.status == "FINISHED" and run.data.metrics["documents"] == 24 and "perplexity" not in run.data.metrics


def test_a_changed_corpus_changes_only_its_readers(workshop: Workshop, first: Finished) -> None:
    parsed = load_recipe(workshop.folder / "micro.yaml", ("stages.corpus.documents=25",))
    store = Store(workshop.folder / ".edgepress")
    identities = {stage.name: stage.identity for stage in make_plan(parsed, store).stages}
    assert {name for name, identity in identities.items() if identity != first.rows[name]["identity"]} == {"corpus", "distilled"}
    assert store.has(identities["pruned"]) and not store.has(identities["distilled"])
