"""What Prefect's UI sends to a server: JSON over HTTP."""

from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from tests.waiting import PATIENCE

_PATIENT = Retry(total=8, connect=0, backoff_factor=0.2, status_forcelist=[503], allowed_methods=None, raise_on_status=False)


def ask(url: str, document: dict[str, Any] | None = None) -> Any:
    """GET an address, or POST a document to it. Asked again when the server is too busy (503: its SQLite is locked), as Prefect's clients do."""
    with requests.Session() as session:
        session.mount("http://", HTTPAdapter(max_retries=_PATIENT))
        answer = session.get(url, timeout=PATIENCE) if document is None else session.post(url, json=document, timeout=PATIENCE)
    assert answer.ok, f"{url}: {answer.status_code} {answer.text}"
    return answer.json() if answer.content else None
