"""What an exception of MLflow, or of what carries its artifacts, means: try again later, or give the call up. Imports no torch."""

import errno
import re
from typing import NoReturn

from compression.redaction import redacted

_CARRIERS = ("botocore.", "boto3.", "azure.", "google.api_core.", "google.auth.", "google.resumable_media.", "urllib3.")  # of artifacts


class TrackingUnavailable(Exception):
    """MLflow does not answer, or cannot do anything now. Trying again later can help."""


class TrackingRejected(Exception):
    """MLflow answered, and will not do this: trying again does not help."""


class Unexpected(TrackingRejected):
    """A call failed in a way that nobody foresaw, by a fault of ours or of a library. It counts as rejected, and keeps its traceback."""


def translate(error: Exception) -> NoReturn:
    """Raise what an exception means.

    Raises:
        TrackingUnavailable: Trying again later can help.
        TrackingRejected: It cannot.
        Unexpected: The exception is neither MLflow's nor a carrier's.
    """
    if isinstance(error, TrackingUnavailable | TrackingRejected):
        raise error
    kind = _meaning(error)
    if kind is None:
        raise Unexpected(redacted(f"{type(error).__name__}: {error}")) from error
    raise kind(redacted(f"{error}".strip().splitlines()[0]) if f"{error}".strip() else type(error).__name__) from error


def _meaning(error: BaseException | None) -> type[TrackingUnavailable] | type[TrackingRejected] | None:
    """What an exception means, by the HTTP status where there was an answer; None where it is neither MLflow's nor a carrier's."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import OperationalError, SQLAlchemyError
    from sqlalchemy.exc import TimeoutError as NoConnection

    if error is None:
        return None
    if status := _status(error):
        return TrackingRejected if 400 <= status < 500 and status not in (408, 429) else TrackingUnavailable
    if isinstance(error, FileNotFoundError | PermissionError | ImportError) or (isinstance(error, OSError) and error.errno == errno.EROFS):
        return TrackingRejected
    if isinstance(error, OSError | OperationalError | NoConnection):
        return TrackingUnavailable
    if isinstance(error, SQLAlchemyError):  # a file that is not a database, an address that is not one
        return TrackingRejected
    # A wrapper: MLflow's client raises its own for what failed below it or for a wrong setting, boto3 for an answer that botocore got.
    wrapper: type[TrackingUnavailable] | type[TrackingRejected] | None = None
    if isinstance(error, MlflowException):
        wrapper = TrackingRejected
    elif type(error).__module__.startswith(_CARRIERS):
        wrapper = TrackingUnavailable
    return wrapper and (_meaning(error.__cause__ or error.__context__) or wrapper)


def _status(error: BaseException) -> int | None:
    """The HTTP status of the answer, by the names that MLflow, requests, botocore, azure.core and google.api_core give it."""
    from mlflow.exceptions import MlflowException, RestException

    if isinstance(error, MlflowException):
        if code := re.search(r"failed with error code (\d{3})", f"{error}"):  # MLflow makes 500 of a status that it has no name for
            return int(code[1])
        answered = isinstance(error, RestException) or error.error_code != "INTERNAL_ERROR"  # the code of exceptions without one
        return error.get_http_status_code() if answered else None
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore; S3 answers 400 when a connection was too slow
        late = response.get("Error", {}).get("Code") == "RequestTimeout"
        return 408 if late else response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    known = (getattr(response, "status_code", None), getattr(error, "status_code", None), getattr(error, "code", None))
    return next((int(status) for status in known if isinstance(status, int)), None)
