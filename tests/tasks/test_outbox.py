"""What MLflow missed: kept on disk, sent in order when it answers, nothing lost and nothing twice."""

import errno
import json
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from boto3.exceptions import S3UploadFailedError
from botocore.exceptions import ClientError, EndpointConnectionError
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException, RestException
from sqlalchemy.exc import OperationalError

from compression.errors import EdgepressError
from compression.locks import is_locked
from tasks.tracking import Tracking
from tasks.tracking.calls import Call, Sender
from tasks.tracking.connection import EXPERIMENT
from tasks.tracking.errors import TrackingRejected, TrackingUnavailable, Unexpected, translate
from tasks.tracking.outbox import Outbox, addresses, waiting
from tests.waiting import PATIENCE


def raised(error: Exception, cause: Exception | None = None) -> Exception:
    """An exception as it is when another made a library raise it."""
    error.__context__ = cause
    return error


GONE = raised(MlflowException("API request to http://tracking failed with exception: refused"), requests.ConnectionError("refused"))


class Flaky:
    """A client whose writes fail while `away`; with `deaf` MLflow does what a call wants, but its answer is lost. `broken`: what single methods raise."""

    def __init__(self, client: MlflowClient):
        self.client, self.away, self.deaf = client, False, False
        self.broken: dict[str, Exception] = {}

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.client, name)

        def call(*arguments: Any, **more: Any) -> Any:
            if self.away:
                raise GONE
            if name in self.broken:
                raise self.broken[name]
            result = method(*arguments, **more)
            if self.deaf:
                raise GONE
            return result

        return call


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("outbox")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    MlflowClient(uri).create_experiment(EXPERIMENT, str(folder / "artifacts"))
    return uri


@pytest.fixture
def connect(uri: str, tmp_path: Path) -> Callable[..., tuple[Tracking, Flaky, list[str]]]:
    """A connection with an outbox, its flaky client, and its messages."""

    def make(folder: str = "outbox", pause: float = 0.05) -> tuple[Tracking, Flaky, list[str]]:
        messages: list[str] = []
        tracking = Tracking(uri, tmp_path / folder, messages.append, pause)
        flaky = Flaky(tracking.client)
        tracking.delivery.sender.client = flaky
        return tracking, flaky, messages

    return make


def points(uri: str, run: str, key: str) -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in MlflowClient(uri).get_metric_history(run, key))


def a_stage(tracking: Tracking, parent: str, name: str = "pruned") -> str:
    """Everything a stage logs."""
    run = tracking.open_run(name, parent=parent, tags={"edgepress.stage": name}, params={"keep": 0.5})
    tracking.log_data(run, "recipe data", "0123", "{}", "training")
    tracking.log_curve(run, [(1, {"loss": 2.0}), (2, {"loss": 1.0})])
    tracking.log_system(run, {"cpu_percent": 100.0}, time.time() + 7)
    tracking.log(run, {"perplexity": 3.5}, tags={"edgepress.state": "Completed"})
    tracking.log(parent, {"perplexity": 3.5}, step=1)
    tracking.log_text(run, "a card", "README.md")
    tracking.describe(run, "what it did")
    tracking.end(run, "FINISHED")
    return run


def check_stage(uri: str, run: str, parent: str, ended: float) -> None:
    client = MlflowClient(uri)
    known = client.get_run(run)
    assert known.info.status == "FINISHED" and known.data.params == {"keep": "0.5"}
    assert known.data.tags["mlflow.parentRunId"] == parent and known.data.tags["mlflow.note.content"] == "what it did"
    assert known.info.start_time <= known.info.end_time <= ended * 1000  # when it ended, not when MLflow heard of it
    assert points(uri, run, "perplexity") == [(0, 3.5)] and points(uri, run, "loss") == [(1, 2.0), (2, 1.0)]
    (system,) = client.get_metric_history(run, "system/cpu_percent")
    assert system.step == (system.timestamp - known.info.start_time) // 1000 >= 6  # seconds since it began
    assert points(uri, parent, "perplexity") == [(1, 3.5)]
    assert len(known.inputs.dataset_inputs) == 1 and [file.path for file in client.list_artifacts(run)] == ["README.md"]
    below = client.search_runs([known.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert [found.info.run_id for found in below] == [run]


def test_calls_arrive_once_after_absence(uri: str, connect: Any, tmp_path: Path) -> None:
    tracking, flaky, messages = connect()
    parent = tracking.open_run("micro")
    flaky.away = True
    run, ended = a_stage(tracking, parent), time.time()
    assert run.startswith("edgepress-") and tracking.waiting == 9 == waiting(tmp_path / "outbox")
    time.sleep(0.3)
    flaky.away = False
    assert tracking.settle(PATIENCE) == 0
    check_stage(uri, tracking.id_of(run), parent, ended)
    assert ["does not answer" in messages[0], "has everything" in messages[-1], len(messages)] == [True, True, 2]
    tracking.log(run, {"size_mb": 1.0})  # our name of the run stays good
    assert points(uri, tracking.id_of(run), "size_mb") == [(0, 1.0)]
    tracking.close()
    assert list((tmp_path / "outbox").iterdir()) == []


def test_lost_answers_duplicate_nothing(uri: str, connect: Any) -> None:
    tracking, flaky, _ = connect()
    parent = tracking.open_run("micro")
    flaky.deaf = True
    run, ended = a_stage(tracking, parent), time.time()
    time.sleep(0.3)  # it is tried again and again
    flaky.deaf = False
    assert tracking.settle(PATIENCE) == 0
    check_stage(uri, tracking.id_of(run), parent, ended)
    tracking.close()


def test_next_process_sends_leftovers(uri: str, connect: Any, tmp_path: Path) -> None:
    tracking, flaky, _ = connect(pause=PATIENCE)  # never sends by itself
    parent = tracking.open_run("micro")
    flaky.away = True
    run, ended = a_stage(tracking, parent), time.time()
    flaky.away = False
    living, killed = tmp_path / "outbox", tmp_path / "killed"
    assert list(Outbox.abandoned(living)) == []  # its process lives
    shutil.copytree(living, killed)
    (file,) = killed.glob("*.jsonl")
    calls = [Call(line["call"], line["arguments"]) for line in map(json.loads, file.read_text().splitlines()[1:])]
    sender = Sender(flaky, tracking.experiment)
    for _ in range(2):  # as if the process had been killed when it had sent these, and noted one
        sender.send(calls[0], perhaps_sent=True)
        sender.send(calls[1], perhaps_sent=True)
    file.with_suffix(".sent").write_text(json.dumps({"sent": 1, "ids": sender.ids}) + "\n")
    with file.open("a") as stream:
        stream.write('{"call": "log", "argum')

    assert addresses(killed) == [uri] and waiting(killed) == 8
    other, _, _ = connect("killed")
    assert other.flush_leftover() == 8 and waiting(killed) == 0
    check_stage(uri, sender.ids[run], parent, ended)
    assert other.find_open_run(run) is not None  # found by our name too
    assert other.flush_leftover() == 0 and list(killed.iterdir()) == []


def test_refused_call_blocks_nothing(uri: str, connect: Any, tmp_path: Path) -> None:
    tracking, flaky, messages = connect()
    deleted, run = tracking.open_run("deleted"), tracking.open_run("micro")
    flaky.away = True
    tracking.log(deleted, {"perplexity": 3.5})
    tracking.log(run, {"perplexity": 3.5})
    MlflowClient(uri).delete_run(deleted)
    flaky.away = False
    assert tracking.settle(PATIENCE) == 0
    assert points(uri, run, "perplexity") == [(0, 3.5)]
    refused = json.loads((tmp_path / "outbox" / "refused.jsonl").read_text())
    assert refused["arguments"]["run"] == deleted and refused["error"] and any("refused 1 calls" in text for text in messages)
    assert tracking.refused == 1
    tracking.close()


def test_refusals_are_reported_once(uri: str, connect: Any, tmp_path: Path) -> None:
    tracking, _, messages = connect()
    parent = tracking.open_run("deleted")
    MlflowClient(uri).delete_run(parent)
    for step in range(1000, 1003):
        tracking.log(parent, {"perplexity": 3.5}, step=step)
    run = a_stage(tracking, parent)
    tracking.log_file(run, tmp_path / "gone")
    tracking.end(parent, "FINISHED")
    assert MlflowClient(uri).get_run(run).info.status == "FINISHED" and points(uri, run, "perplexity") == [(0, 3.5)]
    refused = [json.loads(line) for line in (tmp_path / "outbox" / "refused.jsonl").read_text().splitlines()]
    assert [call["call"] for call in refused] == [*["log"] * 4, "log_file", "end"] and tracking.refused == 6 and tracking.waiting == 0
    assert refused[0]["uri"] == uri and "deleted" in refused[0]["error"]
    assert refused[1]["arguments"]["points"][0][:3] == ["perplexity", 1001, 3.5]
    (message,) = messages
    assert "refuses `log`" in message and "refused.jsonl" in message
    tracking.close()


def test_refused_top_run_raises(uri: str, connect: Any, tmp_path: Path) -> None:
    tracking, _, messages = connect()
    tracking.delivery.sender.experiment = "12345"
    with pytest.raises(EdgepressError, match="12345"):
        tracking.open_run("micro")
    assert messages == [] and not (tmp_path / "outbox").exists()
    tracking.open_run("pruned", parent="0" * 32)  # of a pipeline that has begun
    assert len(messages) == 1 and tracking.refused == 1
    tracking.close()


def answered(status: int) -> requests.HTTPError:
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError(f"{status} Client Error", response=response)


def of_aws(status: int, code: str) -> ClientError:
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject")  # type: ignore[typeddict-item]


def of_module(module: str, **attributes: object) -> Exception:
    """An exception of a library that is not installed, with the attributes by which that tells statuses."""
    error = type("Trouble", (Exception,), {"__module__": module})("trouble")
    vars(error).update(attributes)
    return error


@pytest.mark.parametrize(
    "error",
    [
        answered(413), answered(403), of_aws(403, "AccessDenied"), raised(S3UploadFailedError("failed"), of_aws(403, "AccessDenied")),
        PermissionError(errno.EACCES, "Permission denied", "/mlruns"), OSError(errno.EROFS, "Read-only file system"),
        FileNotFoundError("gone"), ModuleNotFoundError("No module named 'boto3'"),
        MlflowException("the tracking URI must be a valid http or https URI"),
        raised(MlflowException("no such scheme"), KeyError("scheme")),
        MlflowException("API request to endpoint /api failed with error code 413 != 200. Response body: '<html>'"),
        RestException({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no run"}),
        of_module("azure.core.exceptions", status_code=403), of_module("google.api_core.exceptions", code=404),
    ],
    ids=repr,
)  # fmt: skip
def test_permanent_errors_are_rejections(error: Exception) -> None:
    with pytest.raises(TrackingRejected):
        translate(error)


@pytest.mark.parametrize(
    "error",
    [
        GONE, answered(503), answered(429), answered(408), of_aws(503, "SlowDown"), of_aws(400, "RequestTimeout"),
        EndpointConnectionError(endpoint_url="http://s3"), raised(S3UploadFailedError("failed"), of_aws(500, "InternalError")),
        requests.ConnectionError("refused"), OSError(errno.ENOSPC, "No space left on device"), TimeoutError("slow"),
        raised(MlflowException("(sqlite3.OperationalError) database is locked"), OperationalError("x", {}, Exception("database is locked"))),
        MlflowException("API request to endpoint /api failed with error code 502 != 200. Response body: '<html>'"),
        RestException({"error_code": "INTERNAL_ERROR", "message": "trouble"}),
        of_module("azure.core.exceptions"), of_module("google.auth.exceptions"), of_module("google.api_core.exceptions", code=503),
    ],
    ids=repr,
)  # fmt: skip
def test_transient_errors_are_unavailability(error: Exception) -> None:
    with pytest.raises(TrackingUnavailable):
        translate(error)


def test_unexpected_error_keeps_its_cause() -> None:
    mistake = TypeError("log_batch() got an unexpected argument")
    with pytest.raises(Unexpected, match="TypeError: log_batch") as caught:
        translate(mistake)
    assert caught.value.__cause__ is mistake


def test_unexpected_error_is_set_aside(uri: str, connect: Any, tmp_path: Path) -> None:
    tracking, flaky, messages = connect()
    run = tracking.open_run("micro")
    flaky.broken = {"log_text": TypeError("no such argument")}
    tracking.log_text(run, "a card", "README.md")  # at once
    flaky.away = True
    tracking.log_text(run, "a card", "README.md")  # later, by the thread that sends
    tracking.log(run, {"perplexity": 3.5})
    flaky.away = False
    assert tracking.settle(PATIENCE) == 0
    assert points(uri, run, "perplexity") == [(0, 3.5)]
    refused = [json.loads(line) for line in (tmp_path / "outbox" / "refused.jsonl").read_text().splitlines()]
    assert [(call["call"], call["error"]) for call in refused] == [("log_text", "TypeError: no such argument")] * 2
    assert all("in call" in call["traceback"] for call in refused)
    assert tracking.refused == 2 and sum("`log_text` failed unexpectedly" in text for text in messages) == 1
    tracking.close()


def test_sending_thread_survives_full_disk(uri: str, connect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tracking, flaky, messages = connect()
    run = tracking.open_run("micro")
    failures = iter([OSError(errno.ENOSPC, "No space left on device")] * 2)
    original = Outbox.send

    def send(box: Outbox, sender: Sender) -> int:
        for failure in failures:
            raise failure
        return original(box, sender)

    monkeypatch.setattr(Outbox, "send", send)
    flaky.away = True
    tracking.log(run, {"perplexity": 3.5})
    flaky.away = False
    assert tracking.settle(PATIENCE) == 0 and points(uri, run, "perplexity") == [(0, 3.5)]
    assert sum("No space left" in text for text in messages) == 1
    tracking.close()


def test_data_sets_are_logged_under_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    locked: list[bool] = []
    sender = Sender(SimpleNamespace(log_inputs=lambda *_: locked.append(is_locked(tmp_path / "edgepress-tracking.lock"))), "1")
    sender.send(Call("log_data", {"run": "1", "name": "data", "digest": "0123", "source": "{}", "context": "training"}))
    assert locked == [True]


def test_file_is_sent_as_it_was(uri: str, connect: Any, tmp_path: Path) -> None:
    tracking, flaky, _ = connect()
    run, file = tracking.open_run("micro"), tmp_path / "run.json"
    file.write_text("first")
    flaky.away = True
    tracking.log_file(run, file)
    file.write_text("another run's")
    tracking.log_file(run, tmp_path / "gone")
    assert tracking.refused == 1 and "No such file" in (tmp_path / "outbox" / "refused.jsonl").read_text()
    flaky.away = False
    assert tracking.settle(PATIENCE) == 0
    assert Path(MlflowClient(uri).download_artifacts(run, "run.json", str(tmp_path))).read_text() == "first"
    tracking.close()


def test_without_outbox_absence_raises(uri: str) -> None:
    tracking = Tracking(uri)
    run = tracking.open_run("micro")
    flaky = Flaky(tracking.client)
    tracking.delivery.sender.client, flaky.away = flaky, True
    with pytest.raises(TrackingUnavailable):
        tracking.log(run, {"perplexity": 3.5})


def test_absent_server_fails_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[Any] = []
    connect = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: tries.append(address) or connect(self, address), raising=False)
    with pytest.raises(EdgepressError, match=r"http://127.0.0.1:9.*MLFLOW_TRACKING_URI"):
        Tracking("http://127.0.0.1:9", tmp_path)
    assert 1 <= len(tries) <= 2  # MLflow itself would try for minutes


def test_empty_outbox_is_removed(tmp_path: Path) -> None:
    box = Outbox(tmp_path, "sqlite:////x.db")
    box.add(Call("log_text", {"run": "1", "text": "é\n", "path": "x"}))
    assert len(box) == 1 and waiting(tmp_path) == 1
    box.close()
    assert [name.suffix for name in sorted(tmp_path.iterdir())] in ([".jsonl"], [".jsonl", ".lock"])
    (leftover,) = Outbox.abandoned(tmp_path)
    sent: list[str] = []
    assert leftover.uri == "sqlite:////x.db" and leftover.send(Sender(SimpleNamespace(log_text=lambda *text: sent.extend(text)), "1")) == 1
    leftover.close()
    assert sent == ["1", "é\n", "x"] and list(tmp_path.iterdir()) == []
