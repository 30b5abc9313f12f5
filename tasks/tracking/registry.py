"""MLflow's model registry: an artifact becomes a version of a registered model, with aliases. Imports no torch."""

import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import Field

from compression.settings import Settings
from tasks.tracking.serving import FOLDER, PARAMETERS

CONTENT = "edgepress.content"  # tag of a version: the digest of the artifact's bytes
_MODEL = "model"  # where the model lies among the artifacts of its run


class Registry(Settings):
    """Which results become versions of a registered model in MLflow."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_. -]*$", description="The registered model; of several stages each has `<name>-<stage>`."
    )
    stages: tuple[str, ...] = Field(default=(), description="Stages to register. Default: every export that nothing follows.")
    champion: bool = Field(
        default=False,
        description="Whether a version whose gates all passed, and those of every stage before it, becomes `champion`; each stage needs a gate of its own.",
    )


def register(
    client: Any, run: str, *, name: str, path: str, content: str, aliases: list[str], tags: dict[str, str], description: str, extra: str
) -> None:
    """Make the artifact in `path` a version of the model `name`, unless one has this content, and give that version the aliases.

    run    the stage's run, which gets a copy of the artifact
    extra  the extra of edgepress that opens it
    Raises FileNotFoundError when the artifact is gone.
    """
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, description="Compressed by edgepress.", tags={"edgepress": "true"})
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    made = _version_with(client, name, content)
    if made is None:
        if not Path(path).is_dir():
            raise FileNotFoundError(f"the artifact {path} is not there any more")
        with tempfile.TemporaryDirectory(prefix="edgepress-model-") as folder:
            write_model(Path(folder) / _MODEL, Path(path), extra)
            client.log_artifacts(run, str(Path(folder) / _MODEL), _MODEL)
        source = f"{client.get_run(run).info.artifact_uri}/{_MODEL}"
        made = client.create_model_version(name, source, run, tags={**tags, CONTENT: content}, description=description).version
    for alias in aliases:
        client.set_registered_model_alias(name, alias, made)


def write_model(folder: Path, artifact: Path, extra: str) -> None:
    """Write MLflow's description of a model beside links to the artifact's files, which an upload follows."""
    import pandas
    from mlflow import pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    signature = ModelSignature(
        inputs=Schema([ColSpec("string", "prompt")]),
        outputs=Schema([ColSpec("string", "text")]),
        params=ParamSchema([ParamSpec(key, kind, default) for key, (kind, default) in PARAMETERS.items()]),
    )
    example = (pandas.DataFrame({"prompt": ["Once upon a time"]}), {"max_new_tokens": 32})
    needed = f"edgepress[{extra}]" if extra else "edgepress"
    pyfunc.save_model(
        str(folder), loader_module="tasks.tracking.serving", signature=signature, input_example=example, pip_requirements=[f"{needed}=={version('edgepress')}"]
    )  # fmt: skip
    for file in artifact.rglob("*"):
        if file.is_file():
            link = folder / FOLDER / file.relative_to(artifact)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.resolve())


def _version_with(client: Any, name: str, content: str) -> str | None:
    """The last version of a model that has this content."""
    token = None
    while True:
        page = client.search_model_versions(f"name = '{name}'", max_results=200, page_token=token)
        for known in page:
            if known.tags.get(CONTENT) == content:
                return known.version
        token = page.token
        if not token:
            return None
