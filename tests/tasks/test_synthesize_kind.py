"""`synthesize` as a stage, and the stages that read its corpus: what planning refuses, what decides identities, what is trained on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compression.checkpoints.loading import load_tokenizer
from compression.context import Context
from compression.data import DataSpec
from compression.data.rows import encode_document, pack
from compression.errors import EdgepressError
from flows.cli.screen import plan_table
from flows.planning import Plan, check_disk, estimate, load_recipe, make_plan
from tasks.kinds._training import TrainingStage
from tasks.kinds.synthesize import Synthesize
from tasks.stage import Corpus, Inputs, Workplace, stage_kinds
from tasks.store.store import Store
from tests.flows.recipes import recipe

CORPUS = "  corpus: {{uses: synthesize, documents: 20, length: 32{more}}}\n"
PRUNED = "  pruned: {uses: prune.width, needs: base, keep: 0.5}\n"
TRAINED = "  trained: {{uses: {uses}, needs: pruned, steps: 2, batch_size: 2, corpus: corpus{more}}}\n"
REQUIRED = {"prune.rigl": ", sparsity: 0.5, delta_t: 1", "prune.lottery": ", sparsity: 0.5"}
TRAINING = sorted(uses for uses, kind in stage_kinds().items() if issubclass(kind, TrainingStage))


def plan(home: Path, base: Path, *overrides: str, writes: str = "", uses: str = "distill", trains: str = "", more: str = "") -> Plan:
    stages = CORPUS.format(more=writes) + PRUNED + TRAINED.format(uses=uses, more=REQUIRED.get(uses, "") + trains) + more
    (home / "micro.yaml").write_text(recipe(base, stages))
    return make_plan(load_recipe(home / "micro.yaml", overrides), Store(home / "store"))


@pytest.mark.parametrize("uses", TRAINING)
def test_a_stage_that_trains_reads_it_as_an_input(tmp_path: Path, checkpoint: Path, uses: str) -> None:
    made = plan(tmp_path, checkpoint, uses=uses)
    tasks = {task.name: task for task in made.stages}
    assert isinstance(tasks["corpus"].product, Corpus)
    assert tasks["trained"].document["inputs"]["corpus"] == tasks["corpus"].identity
    assert "corpus" not in tasks["trained"].document["parameters"] and "corpus" in tasks["trained"].ancestors
    assert 0 < estimate(tasks["corpus"], made).size < estimate(tasks["corpus"], made).memory
    check_disk(made, Store(tmp_path / "store"))
    assert plan_table(made, Store(tmp_path / "store")).row_count == 4


def test_what_decides_the_bytes(tmp_path: Path, checkpoint: Path) -> None:
    def identities(*overrides: str, writes: str = "", trains: str = "") -> dict[str, str]:
        return {task.name: task.identity for task in plan(tmp_path, checkpoint, *overrides, writes=writes, trains=trains).stages}

    plain, prompted = identities(), identities(writes=", prompt_tokens: 4")
    assert plain["corpus"] != prompted["corpus"] and plain["trained"] != prompted["trained"]
    texts = {name: tmp_path / name for name in ("one", "two")}
    for number, folder in enumerate(texts.values()):
        folder.mkdir()
        (folder / "train.txt").write_text(f"The lamp is in mill {number}.\n\n" * 40)
        for split in ("validation", "test"):
            (folder / f"{split}.txt").write_text("The lamp is in the barn.\n\n" * 40)
    other, another = (f"data.text={{path: {folder}}}" for folder in texts.values())
    assert identities(other) == identities(another)  # neither stage reads the training text
    changed = identities(other, writes=", prompt_tokens: 4"), identities(another, writes=", prompt_tokens: 4")
    assert {name for name in changed[0] if changed[0][name] != changed[1][name]} == {"corpus", "trained"}
    assert identities("data.length=16")["trained"] != plain["trained"]
    before = identities(other, trains=", evaluate_every: 1")
    (texts["one"] / "validation.txt").write_text("The lamp is in the tower.\n\n" * 40)
    assert before["trained"] != identities(other, trains=", evaluate_every: 1")["trained"]


@pytest.mark.parametrize(
    ("arguments", "where", "message"),
    [
        ({"more": "  next: {uses: quantize.gptq, needs: corpus, group_size: 32}\n"}, "9: stages.next.needs", "quantize.gptq cannot follow a corpus"),
        ({"more": "  next: {uses: export.onnx, needs: corpus}\n"}, "9: stages.next.needs", "export.onnx cannot follow a corpus"),
        ({"more": "  next: {uses: synthesize, documents: 1, needs: corpus}\n"}, "9: stages.next.needs", "cannot follow a corpus"),
        ({"more": "  out: {uses: export.onnx}\n  next: {uses: synthesize, documents: 1}\n"}, "10: stages.next", "cannot follow an export"),
        ({"trains": ", teacher: corpus"}, "8: stages.trained.teacher", "corpus cannot teach: it is a corpus"),
        ({"trains": ", train_on: questions"}, "8: stages.trained.corpus", "a corpus is running text"),
        ({"more": "  next: {uses: finetune, needs: pruned, corpus: pruned}\n"}, "9: stages.next.corpus", "pruned writes no corpus"),
        ({"more": "  next: {uses: finetune, needs: pruned, corpus: corpse}\n"}, "9: stages.next.corpus", "did you mean 'corpus'"),
        ({"writes": ", tokens: 5"}, "6: stages.corpus.documents", "`documents` or `tokens`, one of them"),
        ({"writes": ", prompt_tokens: 24"}, "6: stages.corpus.prompt_tokens", "more than length, 32"),
        ({"writes": ", needs: base, top_p: 0"}, "6: stages.corpus.top_p", "greater than 0"),
    ],
)  # fmt: skip
def test_nonsense_is_refused_while_planning(tmp_path: Path, checkpoint: Path, arguments: dict[str, str], where: str, message: str) -> None:
    with pytest.raises(EdgepressError, match=message) as caught:
        plan(tmp_path, checkpoint, **arguments)
    assert f"micro.yaml:{where}" in str(caught.value)


def test_documents_longer_than_the_model_are_refused(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(EdgepressError, match="129 tokens are longer than the model's 128 positions"):
        plan(tmp_path, checkpoint, "stages.corpus.length=129")


@pytest.mark.parametrize("prompt_tokens", [0, 4])
def test_what_it_writes_is_what_the_next_stage_trains_on(tmp_path: Path, checkpoint: Path, prompt_tokens: int) -> None:
    data = DataSpec.model_validate({"text": "embedded", "length": 24, "train_documents": 3})
    made = Synthesize(documents=12, length=24, batch_size=4, prompt_tokens=prompt_tokens)
    metrics = made.run(Inputs(checkpoint, {}), Workplace(tmp_path / "out", tmp_path / "work"), data, Context(seed=1))
    texts = [json.loads(line)["text"] for line in (tmp_path / "out" / "corpus.jsonl").read_text().splitlines()]
    assert len(texts) == metrics["documents"] == 12 and sorted(f.name for f in (tmp_path / "out").iterdir()) == [
        "corpus.json",
        "corpus.jsonl",
    ]

    class Reads(TrainingStage):
        uses: Any = "reads"

    tokenizer = load_tokenizer(checkpoint)
    inputs = Inputs(checkpoint, {"corpus": tmp_path / "out"})
    found = Reads(corpus="corpus", evaluate_every=1, validation_rows=2).rows(inputs, data)
    assert found.rows.tolist() == list(pack((encode_document(tokenizer, text) for text in texts), 24))
    without = Reads(evaluate_every=1, validation_rows=2).rows(inputs, data)
    assert found.validation is not None and without.validation is not None
    assert torch.equal(found.validation[0], without.validation[0]) and found.rows.tolist() != without.rows.tolist()
