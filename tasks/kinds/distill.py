"""`distill`: bring a compressed student back towards its teacher."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from compression.checkpoints.checkpoint import Checkpoint
from compression.context import Context
from compression.data import DataSpec
from compression.distillation import CacheSettings, Divergence, Feature, check_length, check_vocabularies, pair_layers
from compression.errors import Incompatible
from tasks.kinds._training import TrainingStage
from tasks.stage import Inputs, Planned, Workplace


class Distill(TrainingStage):
    """Minimise alpha * divergence from the teacher + beta * cross-entropy + gamma * distance between blocks."""

    uses: Literal["distill"] = "distill"
    version: ClassVar[int] = 2
    former_names: ClassVar[Mapping[str, str]] = {"mixture": "jsd_beta"}
    metrics: ClassVar[tuple[str, ...]] = (*TrainingStage.metrics, "teacher_cache_mb", "teacher_cache_built")

    teacher: Annotated[
        str,
        Field(
            description="`base`, a stage of this recipe, or a model from elsewhere: a directory written with a slash (`./large`) or a hub id "
            "(`org/name`, `org/name@revision`); with the same tokenizer."
        ),
    ] = "base"
    alpha: Annotated[float, Field(ge=0, description="Weight of the divergence between the temperature-scaled distributions.")] = 1.0
    beta: Annotated[float, Field(ge=0, description="Weight of cross-entropy on the labels; 0 is self-distillation.")] = 0.0
    gamma: Annotated[float, Field(ge=0, description="Weight of the distance between blocks.")] = 0.0
    temperature: Annotated[float, Field(gt=0, description="Softens both distributions (Hinton et al. 2015).")] = 2.0
    divergence: Annotated[
        Divergence, Field(description="`forward` KL(teacher, student), `reverse` KL(student, teacher), or `js` (Jensen-Shannon).")
    ] = "forward"
    jsd_beta: Annotated[float, Field(gt=0, lt=1, description="Share of the teacher in the distribution between both, of `js`.")] = 0.5
    feature: Annotated[
        Feature, Field(description="What blocks are compared by: hidden states (squares or cosine), attention maps, gradients.")
    ] = "hidden_mse"
    feature_layers: Annotated[
        Literal["last", "middle", "uniform"] | dict[int, int],
        Field(description="Pairs of blocks to compare: a rule, or {student: teacher}."),
    ] = "middle"
    teacher_cache: Annotated[
        Literal["none", "full", "top_k"],
        Field(
            description="Keep the teacher's outputs on disk for every stage that asks the same: `full`, or the `top_k` likeliest tokens and the "
            "mass of the rest."
        ),
    ] = "none"
    top_k: Annotated[int, Field(ge=1, description="Tokens kept for each position by `teacher_cache: top_k`.")] = 64
    cache_dtype: Annotated[Literal["float32", "float16"], Field(description="In which the cache keeps them.")] = "float32"

    def other_inputs(self) -> dict[str, str]:
        inside = {"teacher": self.teacher} if self._taught and "/" not in self.teacher else {}
        return super().other_inputs() | inside

    def outside_inputs(self) -> dict[str, str]:
        return {"teacher": self.teacher} if self._taught and "/" in self.teacher else {}

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
        if (cache := self._cache()) is not None:
            cache.check(alpha=self.alpha, gamma=self.gamma, vocabulary=min(parent.vocab_size, teacher.vocab_size))
        return parent

    def run(self, inputs: Inputs, place: Workplace, data: DataSpec, context: Context) -> dict[str, float]:
        from compression.distillation.distill import distill

        teacher = inputs.others.get("teacher", inputs.parent)
        return self.train(
            distill, inputs.parent, teacher, place.out, **self.rows(inputs, data, context), alpha=self.alpha, beta=self.beta, gamma=self.gamma,
            temperature=self.temperature, divergence=self.divergence, jsd_beta=self.jsd_beta, feature=self.feature,
            feature_layers=self.feature_layers, teacher_cache=self._cache(), cache=place.shared and place.shared / "teachers",
            settings=self.settings(), workdir=place.work, context=context,
        )  # fmt: skip

    @property
    def _taught(self) -> bool:
        return bool(self.alpha or self.gamma)

    def _cache(self) -> CacheSettings | None:
        return None if self.teacher_cache == "none" else CacheSettings(self.teacher_cache, self.top_k, self.cache_dtype)
