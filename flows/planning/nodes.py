"""The parts of a recipe's graph: nodes, the settings of their execution, and the branches of a matrix. Imports no torch."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from compression.settings import Settings
from flows.planning.source_map import KeyPath
from tasks.measurement.gates import Bound
from tasks.stage import Stage

BASE = "base"


class StageExecution(Settings):
    """How a stage is executed; outside its identity."""

    needs: str | None = Field(
        default=None, description="The stage whose checkpoint this one takes, or `base`. Default: the stage before it in the file."
    )
    retries: int = Field(
        default=1, ge=0, le=10, description="How often a stage whose process was lost (killed, out of memory) is started again."
    )
    timeout: float | None = Field(
        default=None, gt=0, description="Seconds after which the stage is stopped; `retries` does not start it again."
    )
    job_variables: dict[str, Any] = Field(
        default_factory=dict,
        description="With `runner: prefect`: variables of the work pool for this stage's job, such as a GPU or memory request to kubernetes or docker.",
    )
    bounds: dict[str, Bound] = Field(
        default_factory=dict,
        description="Bounds of an export's proof by metric, in place of the defaults of its format (kl_to_parent: {max: 0.2}).",
    )


class Node(BaseModel):
    """A stage of the graph: what it computes and how it is executed.

    name       unique; that of a copy lists the matrix values that reach it: `gptq@temperature=2,bits=4`
    origin     its name in the recipe
    seed       the recipe's, or the cell's
    gates      by metric; `relative_to` names stages of the graph. `gated_by` is the key of the recipe that gives them
    redirects  its values that the matrix gives, and their places there
    """

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    name: str
    stage: Stage
    parent: str
    execution: StageExecution
    origin: str
    seed: int
    gates: Mapping[str, Bound]
    gated_by: str
    redirects: Mapping[KeyPath, KeyPath]

    @property
    def inputs(self) -> dict[str, str]:
        """Names of stages by role."""
        return {"parent": self.parent, **self.stage.other_inputs()}


class Branch(BaseModel):
    """A cell of the matrix in the graph.

    values  by key: {"distill.temperature": 2}
    stages  the stages that compute this cell, from their names in the recipe to their names in the graph
    leaves  names in the recipe of the stages that nothing follows and that a value of the cell reaches
    """

    model_config = ConfigDict(frozen=True)

    name: str
    values: Mapping[str, Any]
    stages: Mapping[str, str]
    leaves: tuple[str, ...]
