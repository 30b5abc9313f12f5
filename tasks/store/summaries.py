"""The summary of every run, kept beside its journal as `runs/<run>.summary.json`: the data of reports and comparisons. Imports no torch.

`outputs/<recipe>/run.json` is that of the last run only. A summary is removed with its journal.
"""

import json
from pathlib import Path
from typing import Any

from compression.errors import EdgepressError
from compression.files import write_json
from tasks.store.journal import RUNS, current_state, read_run
from tasks.store.store import Store

SUMMARY = 1  # raise it when the summaries of an older edgepress cannot be shown
_SUFFIX = ".summary.json"


def write_summary(store: Store, run: str, summary: dict[str, Any]) -> None:
    """Keep the summary of a run, by its name in the journal."""
    write_json(_file(store, run), {"version": SUMMARY, "summary": summary})


def read_summary(store: Store, run: str) -> dict[str, Any]:
    """Return the summary of a run, by its name in the journal.

    Raises:
        EdgepressError: There is no such run; or it has no summary, because it is running, was killed, or is older than summaries; or its
            summary is damaged or of another version.
    """
    known, file = read_run(store, run), _file(store, run)
    try:
        document = json.loads(file.read_bytes())
        version, summary = document["version"], document["summary"]
    except FileNotFoundError:
        reason = {
            "Running": "is still running: its summary is written at its end",
            "Crashed": "was killed before its summary was written; `edgepress resume` resumes it",
        }.get(current_state(store, known), "has no summary: it ended before its first stage, or an edgepress made it that kept none")
        raise EdgepressError(f"{run} {reason}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise EdgepressError(f"{file} is not the summary of a run: {error}; remove it, and `edgepress run` the recipe again") from None
    if version != SUMMARY:
        raise EdgepressError(
            f"{file} has version {version}, this edgepress reads {SUMMARY}; run the recipe again, or use a matching version"
        )
    return summary


def summary_files(store: Store) -> dict[str, Path]:
    """Return the files of all summaries, by run."""
    return {file.name.removesuffix(_SUFFIX): file for file in sorted((store.root / RUNS).glob(f"[!.]*{_SUFFIX}"))}


def _file(store: Store, run: str) -> Path:
    return store.root / RUNS / f"{run}{_SUFFIX}"
