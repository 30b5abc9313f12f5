"""`distill`: bring a compressed student back towards its teacher."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from compression.checkpoint import Checkpoint
from compression.context import Context
from compression.data import DataSpec
from compression.distillation import check_vocabularies, pair_layers
from compression.errors import Incompatible
from tasks.kinds._training import TrainingStage
from tasks.stage import Artifact, Inputs, Planned, Workplace


class Distill(TrainingStage):
    """Minimise alpha * KL to the teacher + beta * cross-entropy + gamma * hidden-state loss."""

    uses: Literal["distill"] = "distill"
    version: ClassVar[int] = 1

    teacher: Annotated[str, Field(description="`base` or a stage of this recipe, with the same tokenizer.")] = "base"
    alpha: Annotated[float, Field(ge=0, description="Weight of the temperature-scaled KL divergence.")] = 1.0
    beta: Annotated[float, Field(ge=0, description="Weight of cross-entropy on the labels; 0 is self-distillation.")] = 0.0
    gamma: Annotated[float, Field(ge=0, description="Weight of the hidden-state loss.")] = 0.0
    temperature: Annotated[float, Field(gt=0, description="Softens both distributions (Hinton et al. 2015).")] = 2.0
    feature_layers: Annotated[
        Literal["last", "middle", "uniform"] | dict[int, int],
        Field(description="Pairs for the hidden-state loss: a rule, or {student: teacher}."),
    ] = "middle"

    def other_inputs(self) -> dict[str, str]:
        return {"teacher": self.teacher} if self.alpha or self.gamma else {}

    def plan(self, parent: Checkpoint, others: Mapping[str, Planned], data: DataSpec) -> Planned:
        self.check_data(parent, data)
        if not self.alpha + self.beta + self.gamma:
            raise Incompatible("alpha, beta and gamma are all 0, so there is nothing to learn", key="alpha")
        teacher = others.get("teacher", parent)
        if isinstance(teacher, Artifact):
            raise Incompatible(f"an export ({teacher.runtime}) cannot teach; name a checkpoint stage", key="teacher")
        if parent.path.is_dir() and teacher.path.is_dir():
            check_vocabularies(parent, teacher)
        if self.gamma:
            pair_layers(self.feature_layers, parent.num_layers, teacher.num_layers)
        return parent

    def run(self, inputs: Inputs, place: Workplace, data: DataSpec, context: Context) -> dict[str, float]:
        from compression.distillation.distill import distill

        teacher = inputs.others.get("teacher", inputs.parent)
        return distill(
            inputs.parent, teacher, place.out, **self.rows(inputs.parent, data, context), alpha=self.alpha, beta=self.beta, gamma=self.gamma,
            temperature=self.temperature, feature_layers=self.feature_layers, settings=self.settings(), workdir=place.work, context=context,
        )  # fmt: skip
