"""MLflow's model registry: an artifact becomes a version of a registered model, with aliases. Imports no torch."""

import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import Field

from compression.settings import Settings
from tasks.tracking.serving import FOLDER, PARAMETERS

CONTENT = "edgepress.content"  # tag of a version: the digest of the artifact's bytes
_MODEL = "model"  # the model's folder among the artifacts of its run


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


@dataclass(frozen=True)
class ModelVersion:
    """An artifact that becomes a version of a registered model.

    Attributes:
        name: The registered model.
        path: The directory of the artifact.
        content: The digest of its bytes.
        aliases: What the version is called besides its number.
        tags: Tags of the version.
        description: What people read about it (Markdown).
        extra: The extra of edgepress that opens the artifact, if any.
    """

    name: str
    path: str
    content: str
    aliases: list[str]
    tags: dict[str, str]
    description: str
    extra: str


def register(client: Any, run: str, version: ModelVersion) -> None:
    """Make an artifact a version of its model, unless a version has this content, and give that version the aliases.

    Args:
        client: MLflow's client.
        run: The stage's run, which gets a copy of the artifact.
        version: The artifact and what the version says about it.

    Raises:
        FileNotFoundError: The artifact is gone.
    """
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(version.name, description="Compressed by edgepress.", tags={"edgepress": "true"})
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    number = _version_with(client, version.name, version.content)
    if number is None:
        if not Path(version.path).is_dir():
            raise FileNotFoundError(f"the artifact {version.path} is not there any more")
        with tempfile.TemporaryDirectory(prefix="edgepress-model-") as folder:
            write_model(Path(folder) / _MODEL, Path(version.path), version.extra)
            client.log_artifacts(run, str(Path(folder) / _MODEL), _MODEL)
        source = f"{client.get_run(run).info.artifact_uri}/{_MODEL}"
        tags = {**version.tags, CONTENT: version.content}
        number = client.create_model_version(version.name, source, run, tags=tags, description=version.description).version
    for alias in version.aliases:
        client.set_registered_model_alias(version.name, alias, number)


def write_model(folder: Path, artifact: Path, extra: str) -> None:
    """Write MLflow's description of a model, and links to the artifact's files, which an upload follows."""
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
    package = f"edgepress[{extra}]" if extra else "edgepress"
    pyfunc.save_model(
        str(folder),
        loader_module="tasks.tracking.serving",
        signature=signature,
        input_example=example,
        pip_requirements=[f"{package}=={version('edgepress')}"],
    )
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
