"""The address of MLflow and the connection to it. Imports no torch."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compression.errors import EdgepressError
from compression.redaction import MASK, redacted
from tasks.tracking.database import make_database
from tasks.tracking.errors import TrackingRejected, TrackingUnavailable, translate

EXPERIMENT = "edgepress"


def tracking_uri() -> str:
    """Return `MLFLOW_TRACKING_URI`, or a sqlite file in the current directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"


def stored_address(uri: str) -> str:
    """Return an address as files keep it: without user and password, and that of a sqlite file from the root, for `sync` may run elsewhere."""
    path = uri.removeprefix("sqlite:///")
    return redacted(uri if path == uri or path.startswith("/") else f"sqlite:///{Path(path).absolute()}")


def full_address(stored: str) -> str:
    """Return an address that a file keeps with the user and password of `MLFLOW_TRACKING_URI`, where that is the same address.

    Raises:
        EdgepressError: It needs a user or a password, and `MLFLOW_TRACKING_URI` is another address.
    """
    if stored_address(tracking_uri()) == redacted(stored):
        return tracking_uri()
    if MASK in stored:
        raise EdgepressError(f"MLflow at {stored} needs a user or a password, which is not kept: give the address in MLFLOW_TRACKING_URI")
    return stored


def connect(uri: str) -> tuple[Any, str]:
    """Return a client and the id of our experiment. Raises EdgepressError where MLflow does not answer."""
    prepare_mlflow()
    from mlflow import MlflowClient

    with answer_required(uri):
        make_database(uri)
        client = MlflowClient(uri)
        return client, _experiment(client)


def prepare_mlflow() -> None:
    """Set what MLflow reads when it is imported. It would try for minutes to reach a server that is away: our outbox waits instead."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # it would print the password of an address at the end of every run
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # one, for a connection that the server closed while it was idle
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    import logging

    logging.getLogger("alembic").setLevel(logging.ERROR)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # logs every try


@contextmanager
def answer_required(uri: str) -> Iterator[None]:
    """Raise EdgepressError for whatever fails in the block, which calls MLflow before a run begins."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  (sorted there)
        try:
            translate(error)
        except (TrackingUnavailable, TrackingRejected) as known:
            raise EdgepressError(
                f"MLflow at {uri} does not answer: {known}. Start it, or set MLFLOW_TRACKING_URI to another (unset: a file mlflow.db here); "
                "nothing was run"
            ) from known


def _experiment(client: Any) -> str:
    """The id of our experiment, which the first process creates."""
    from mlflow.exceptions import MlflowException

    if found := client.get_experiment_by_name(EXPERIMENT):
        return found.experiment_id
    try:
        return client.create_experiment(EXPERIMENT, tags={"mlflow.experimentKind": "custom_model_development"})
    except MlflowException as error:
        found = client.get_experiment_by_name(EXPERIMENT) if error.error_code == "RESOURCE_ALREADY_EXISTS" else None
        if found is None:
            raise
        return found.experiment_id
