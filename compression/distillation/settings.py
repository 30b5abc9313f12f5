"""What a student minimises and what it learns from. Imports no torch: recipes are validated with it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from compression.errors import Incompatible
from compression.settings import Settings
from compression.training import TrainingSettings

FeatureLayers = Literal["last", "middle", "uniform"] | Mapping[int, int]
Divergence = Literal["forward", "reverse", "js"]
Feature = Literal["hidden_mse", "hidden_cosine", "attention", "gradient"]


class ObjectiveSettings(Settings):
    """The loss alpha * divergence from the teacher + beta * cross-entropy + gamma * distance between blocks."""

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

    @property
    def needs_teacher(self) -> bool:
        """Whether a term with a weight compares the student with a teacher."""
        return bool(self.alpha or self.gamma)


NEXT_TOKENS = ObjectiveSettings(alpha=0.0, beta=1.0, temperature=1.0)
"""Cross-entropy on next tokens alone, without a teacher."""


@dataclass(frozen=True)
class CacheSettings:
    """What is kept of a teacher's outputs, for each position that counts.

    Attributes:
        keep: "full": what its output head reads, and the head once, so 4 * width bytes for the whole distribution;
            "top_k": the `top_k` likeliest tokens and the mass of all others, 8 * top_k bytes.
        top_k: Tokens kept for each position.
        dtype: float32 (exact) or float16 (half of it).
    """

    keep: Literal["full", "top_k"]
    top_k: int = 64
    dtype: Literal["float32", "float16"] = "float32"

    def check(self, *, alpha: float, gamma: float, vocabulary: int) -> None:
        """Raise Incompatible where a cache cannot give what the loss needs of a teacher."""
        if gamma:
            raise Incompatible(
                f"gamma {gamma} compares blocks, and the teacher cache keeps outputs only; set gamma to 0, or teacher_cache to none",
                key="teacher_cache",
            )
        if not alpha:
            raise Incompatible("with alpha 0 no output of a teacher is needed; set teacher_cache to none", key="teacher_cache")
        if self.keep == "top_k" and not 1 <= self.top_k < vocabulary:
            raise Incompatible(
                f"top_k {self.top_k} leaves no tail of a vocabulary of {vocabulary}; take fewer, or teacher_cache full", key="top_k"
            )


class DistillationSettings(TrainingSettings, ObjectiveSettings):
    """Distillation: training (`TrainingSettings`) on an objective (`ObjectiveSettings`) that compares with a teacher.

    In a recipe:

        distilled:
          uses: distill
          steps: 300
          temperature: 2.0
          beta: 0.5
          teacher_cache: top_k

    Lifecycle: planning checks that teacher and student share a vocabulary and have the blocks that `feature_layers` names. With a
    `teacher_cache` the teacher runs over all rows once, before the training; without, it runs in every step. The training itself is
    that of `TrainingSettings`.

    beta = 0 needs no labels (self-distillation, L2PSD of arXiv 2505.18166); alpha = gamma = 0 is fine-tuning, and no teacher is loaded.
    A teacher that fills a cache runs in batches of its own, so a last bit may differ from a training without one; two trainings with
    the cache are bit-equal, whichever of them filled it.
    """

    former_names: ClassVar[Mapping[str, str]] = {"mixture": "jsd_beta"}

    feature_layers: Annotated[
        Literal["last", "middle", "uniform"] | dict[int, int],
        Field(description="Pairs of blocks to compare: a rule, or {student: teacher}."),
    ] = "middle"
    teacher_cache: Annotated[
        Literal["none", "full", "top_k"],
        Field(
            description="Keep the teacher's outputs on disk for every stage that needs the same: `full`, or the `top_k` likeliest tokens and "
            "the mass of the rest."
        ),
    ] = "none"
    top_k: Annotated[int, Field(ge=1, description="Tokens kept for each position by `teacher_cache: top_k`.")] = 64
    cache_dtype: Annotated[Literal["float32", "float16"], Field(description="In which the cache keeps them.")] = "float32"

    @property
    def cache(self) -> CacheSettings | None:
        """What the teacher cache keeps; None without one."""
        return None if self.teacher_cache == "none" else CacheSettings(self.teacher_cache, self.top_k, self.cache_dtype)
