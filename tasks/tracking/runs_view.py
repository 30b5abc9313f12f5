"""The table of runs in MLflow's UI as edgepress opens it. Imports no torch and no MLflow.

MLflow keeps the state of a shared table (its columns, order, filter and groups) as a tag of the experiment, and an address names the tag. The
table's menu of saved views lists it too.
"""

import json

KEY = "edgepress"
TAG = f"mlflow.sharedViewState.{KEY}"
RUN = "edgepress.run"  # tag of all runs of a pipeline: its name in the journal
COLUMNS = ("accuracy", "perplexity", "kl_to_base", "size_mb", "tokens_per_second")
_CREATED = 1764374400000  # Unix time in ms; fixed, so that the same view is the same text


def view_state() -> str:
    """Return the tag's value: the columns, and the runs of each pipeline as an open group.

    MLflow's tree of runs would be closed: a shared view does not say which of its branches are open.
    """
    state = {
        "selectedColumns": [*(f"metrics.`{metric}`" for metric in COLUMNS), "tags.`edgepress.uses`", "tags.`edgepress.state`"],
        "groupBy": {"aggregateFunction": "max", "groupByKeys": [{"mode": "tag", "groupByData": RUN}]},
        "groupsExpanded": {},
    }
    return json.dumps({"name": KEY, "createdAt": _CREATED, "updatedAt": _CREATED, "state": json.dumps(state)})


def runs_address(server: str, experiment: str) -> str:
    """Return the address of the table at an MLflow server."""
    return f"{server}/#/experiments/{experiment}/runs?workflowType=machine_learning&viewStateShareKey={KEY}"
