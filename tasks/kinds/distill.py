"""`distill`: bring a compressed student back towards its teacher."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from compression.checkpoints.checkpoint import Checkpoint
from compression.context import Context
from compression.data import DataSpec
from compression.distillation import DistillationSettings, check_length, check_vocabularies, pair_layers
from compression.errors import Incompatible
from tasks.kinds._training import TrainingStage
from tasks.stage import Inputs, Planned, Workplace


class Distill(TrainingStage, DistillationSettings):
    """Minimise alpha * divergence from the teacher + beta * cross-entropy + gamma * distance between blocks."""

    uses: Literal["distill"] = "distill"
    version: ClassVar[int] = 2
    metrics: ClassVar[tuple[str, ...]] = (*TrainingStage.metrics, "teacher_cache_mb", "teacher_cache_built")

    teacher: Annotated[
        str,
        Field(
            description="`base`, a stage of this recipe, or a model from elsewhere: a directory written with a slash (`./large`) or a hub id "
            "(`org/name`, `org/name@revision`); with the same tokenizer."
        ),
    ] = "base"

    def other_inputs(self) -> dict[str, str]:
        inside = {"teacher": self.teacher} if self.needs_teacher and "/" not in self.teacher else {}
        return super().other_inputs() | inside

    def outside_inputs(self) -> dict[str, str]:
        return {"teacher": self.teacher} if self.needs_teacher and "/" in self.teacher else {}

    def plan(self, parent: Checkpoint, others: Mapping[str, Planned], data: DataSpec) -> Planned:
        self.check_data(parent, others, data)
        if not self.alpha + self.beta + self.gamma:
            raise Incompatible("alpha, beta and gamma are all 0, so there is nothing to learn", key="alpha")
        teacher = others.get("teacher", parent)
        if not isinstance(teacher, Checkpoint):
            raise Incompatible(f"{self.teacher} cannot teach: it is {teacher.words}; name a checkpoint stage", key="teacher")
        if parent.path.is_dir() and teacher.path.is_dir():
            check_vocabularies(parent, teacher)
        check_length(teacher, data.length)
        if self.gamma:
            pair_layers(self.feature_layers, parent.num_layers, teacher.num_layers)
        if self.cache is not None:
            self.cache.check(alpha=self.alpha, gamma=self.gamma, vocabulary=min(parent.vocab_size, teacher.vocab_size))
        return parent

    def run(self, inputs: Inputs, place: Workplace, data: DataSpec, context: Context) -> dict[str, float]:
        from compression.distillation import distill

        teacher = inputs.others.get("teacher", inputs.parent)
        return self.train(
            distill, inputs.parent, teacher, place.out, self.rows(inputs, data), workdir=place.work, context=context,
            cache_folder=place.shared and place.shared / "teachers",
        )  # fmt: skip
