import pickle

import pytest

from compression.errors import EdgepressError
from compression.redaction import redacted
from tasks.errors import JobFailed


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://ada:hunter2@db:5432/mlflow", "postgresql://***@db:5432/mlflow"),
        ("at postgresql+psycopg2://ada:h/u@n:t#er2@db/x failed", "at postgresql+psycopg2://***@db/x failed"),
        ("two: 'http://a:b@h/1', \"http://c@h/2\"", "two: 'http://***@h/1', \"http://***@h/2\""),
        ("s3://key:secret@bucket/a", "s3://***@bucket/a"),
        ("http://h/a?X-Amz-Signature=abc&x=1&password=pw", "http://h/a?X-Amz-Signature=***&x=1&password=***"),
        ("http://127.0.0.1:5000/#/experiments/1", "http://127.0.0.1:5000/#/experiments/1"),
        ("sqlite:////home/me@work/mlflow.db and org/name@main", "sqlite:////home/me@work/mlflow.db and org/name@main"),
        ("tcp://h:1 of ada@example.org", "tcp://h:1 of ada@example.org"),
    ],
)
def test_user_and_password_of_addresses_are_masked(text: str, shown: str) -> None:
    assert redacted(text) == shown == redacted(shown)


def test_errors_carry_no_password() -> None:
    assert "hunter2" not in str(EdgepressError("http://ada:hunter2@h does not answer")) + str(JobFailed("x://a:hunter2@h", transient=False))
    assert str(pickle.loads(pickle.dumps(EdgepressError("http://ada:hunter2@h")))) == "http://***@h"
