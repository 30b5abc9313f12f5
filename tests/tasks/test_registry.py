"""Artifacts in MLflow's model registry, and what opens them."""

import json
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pandas
import pytest
from mlflow import MlflowClient, pyfunc

from compression.errors import EdgepressError, Incompatible
from tasks.tracking import ModelVersion, Tracking
from tasks.tracking.connection import EXPERIMENT
from tasks.tracking.serving import EdgeModel
from tests.tiny import SENTENCES

PROMPTS = SENTENCES[:2]


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tracking]:
    folder = tmp_path_factory.mktemp("registry")
    before = mlflow.get_tracking_uri()
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    MlflowClient(uri).create_experiment(EXPERIMENT, str(folder / "artifacts"))
    made = Tracking(uri, folder / "outbox")
    mlflow.set_tracking_uri(made.uri)  # what a user does before `models:/` can be opened
    yield made
    mlflow.set_tracking_uri(before)
    made.close()


def put(tracking: Tracking, path: Path, content: str, *aliases: str) -> str:
    """Register a result of a new run; returns the run."""
    run = tracking.open_run("gguf")
    tracking.register(run, ModelVersion("tiny", str(path), content, list(aliases), {"edgepress.stage": "gguf"}, "*small*", extra=""))
    return run


def versions(tracking: Tracking) -> dict[str, str]:
    """Contents by version."""
    return {found.version: found.tags["edgepress.content"] for found in tracking.client.search_model_versions("name = 'tiny'")}


@pytest.fixture(scope="module")
def first(tracking: Tracking, checkpoint: Path) -> str:
    return put(tracking, checkpoint, "aaaa", "candidate", "champion")


def test_result_becomes_one_version(tracking: Tracking, first: str, checkpoint: Path) -> None:
    assert list(versions(tracking).values()) == ["aaaa"]
    put(tracking, checkpoint, "aaaa", "candidate")
    assert len(versions(tracking)) == 1
    version = tracking.client.get_model_version_by_alias("tiny", "champion")
    assert version.run_id == first and version.description == "*small*" and version.tags["edgepress.stage"] == "gguf"


def test_mlflow_model_matches_transformers(tracking: Tracking, first: str, checkpoint: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = pyfunc.load_model("models:/tiny@candidate")
    answers = model.predict(pandas.DataFrame({"prompt": PROMPTS}), params={"max_new_tokens": 8})["text"].tolist()
    judge, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        tokens = tokenizer(prompt, return_tensors="pt")
        made = judge.generate(**tokens, max_new_tokens=8, do_sample=False)[0, tokens.input_ids.shape[1] :]
        assert answer == tokenizer.decode(made, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert {spec.name for spec in model.metadata.get_params_schema().params} >= {"max_new_tokens", "temperature"}
    assert model.metadata.get_input_schema().input_names() == ["prompt"]
    assert model.input_example["prompt"].tolist() == ["Once upon a time"]  # type: ignore[index]


def test_champion_stays_until_replaced(tracking: Tracking, first: str, checkpoint: Path) -> None:
    run = put(tracking, checkpoint, "bbbb", "candidate")
    assert tracking.client.get_model_version_by_alias("tiny", "candidate").run_id == run
    assert tracking.client.get_model_version_by_alias("tiny", "champion").run_id == first
    put(tracking, checkpoint, "bbbb", "candidate", "champion")
    assert tracking.client.get_model_version_by_alias("tiny", "champion").run_id == run


def test_files_are_copied(tracking: Tracking, first: str) -> None:
    client = MlflowClient(tracking.uri)
    kept = Path(client.download_artifacts(first, "model/artifact"))
    assert (kept / "model.safetensors").is_file() and not (kept / "model.safetensors").is_symlink()


def test_missing_artifact_is_refused(tracking: Tracking, tmp_path: Path) -> None:
    put(tracking, tmp_path / "absent", "cccc", "candidate")
    assert tracking.refused == 1 and "cccc" not in versions(tracking).values()
    refused = json.loads((Path(tracking.uri.removeprefix("sqlite:///")).parent / "outbox" / "refused.jsonl").read_text())
    assert refused["call"] == "register" and "absent" in refused["error"]


@pytest.mark.parametrize(
    ("prompt", "params", "error"),
    [
        ("x", {"max_new_tokens": 0}, EdgepressError),
        ("x", {"max_new_tokens": 2.5}, EdgepressError),
        ("x", {"temperature": -1.0}, EdgepressError),
        ("x", {"temperature": float("nan")}, EdgepressError),
        ("x", {"temperature": "warm"}, EdgepressError),
        ("x", {"temperature": 1.0, "top_p": float("nan")}, EdgepressError),
        ("x", {"temperature": 1.0, "seed": -1}, EdgepressError),
        (["x", "y"], {}, EdgepressError),
        ("lamp " * 200, {}, Incompatible),
        ("x", {"chat": True}, Incompatible),
    ],
)
def test_bad_prompts_and_parameters_are_refused(
    checkpoint: Path, prompt: object, params: dict[str, object], error: type[Exception]
) -> None:
    with pytest.raises(error):
        EdgeModel(checkpoint).predict(pandas.DataFrame({"prompt": [prompt]}), params)


def test_none_means_default(checkpoint: Path) -> None:
    model, prompts = EdgeModel(checkpoint), pandas.DataFrame({"prompt": PROMPTS})
    few: dict[str, object] = {"max_new_tokens": 4}
    of_none, of_defaults = (model.predict(prompts, {**few, **more}) for more in ({"temperature": None, "seed": None}, {}))
    assert of_none["text"].tolist() == of_defaults["text"].tolist()
