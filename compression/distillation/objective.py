"""What a student minimises: L = α·L_KD + β·L_task + γ·L_feature, with or without a teacher."""

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from compression.distillation.compatibility import Divergence, Feature
from compression.distillation.features import distance_of, look, prepare
from compression.distillation.losses import MAX_LOGITS, cross_entropy, kd_loss, log_probabilities, sum_in_chunks
from compression.distillation.projector import Projectors
from compression.distillation.targets import HeadTargets, Targets
from compression.distillation.teacher_cache import TeacherCache
from compression.errors import EdgepressError, Incompatible


class Objective(nn.Module):
    """Holds the student and the projectors as what learns, and the teacher, where a term asks for one, as what does not.

    Positions that count are those whose next token is a target, in every term alike. The output head runs on them alone, in
    chunks of at most `max_logits` elements.

    teacher     the model to learn from; or
    cache       what it said about the training rows before: enough for alpha
    divergence  forward, reverse or js, with its `jsd_beta` (`losses.kd_loss`)
    feature     what blocks are compared by (`features.look`), for the pairs `layers` of student block -> teacher block

    Raises EdgepressError when no term has a weight, or one that needs a teacher has none; Incompatible when the model does more
    to its hidden states than apply its output head.
    """

    def __init__(
        self, student: PreTrainedModel, *, teacher: PreTrainedModel | None = None, cache: TeacherCache | None = None, alpha: float = 0.0,
        beta: float = 0.0, gamma: float = 0.0, temperature: float = 1.0, divergence: Divergence = "forward", jsd_beta: float = 0.5,
        feature: Feature = "hidden_mse", layers: Mapping[int, int] | None = None, seed: int = 0, max_logits: int = MAX_LOGITS,
    ):  # fmt: skip
        super().__init__()
        if alpha == beta == gamma == 0:
            raise EdgepressError("alpha, beta and gamma are all 0, so there is nothing to minimise; set one of them", key="alpha")
        if min(alpha, beta, gamma) < 0 or temperature <= 0:
            raise EdgepressError(
                f"alpha {alpha}, beta {beta} and gamma {gamma} cannot be negative, and temperature {temperature} must be above 0",
                key="alpha",
            )
        if (alpha and teacher is None and cache is None) or (gamma and teacher is None):
            raise EdgepressError("alpha and gamma compare the student with a teacher, and none was given", key="teacher")
        if not 0 < jsd_beta < 1:
            raise EdgepressError(f"jsd_beta is {jsd_beta}; it is a share between 0 and 1", key="jsd_beta")
        if cache is not None and (teacher is not None or cache.temperature != temperature):
            raise EdgepressError(
                f"a cache at temperature {cache.temperature} stands for a teacher at that temperature: give it alone, and no other",
                key="teacher_cache",
            )
        self.student = student
        self.alpha, self.beta, self.gamma, self.temperature, self.max_logits = alpha, beta, gamma, temperature, max_logits
        self.divergence, self.jsd_beta, self.feature = divergence, jsd_beta, feature
        self.layers = dict(layers or {}) if gamma else {}
        # in a tuple: nn.Module would take it for a part of what is trained and saved
        self.frozen = () if teacher is None else (teacher.eval().requires_grad_(False),)
        for model in (student, *self.frozen):
            _check_head(model)
            if self.layers:
                prepare(model, feature)
        self.cache = cache
        self.targets: Targets | None = cache.targets if cache else None
        if teacher is not None:
            vocabulary = min(student.config.vocab_size, teacher.config.vocab_size)
            self.targets = HeadTargets(teacher.get_output_embeddings(), vocabulary, temperature)
        widths = [model.config.hidden_size for model in (student, teacher or student)]
        self.projectors = Projectors({} if feature == "attention" else self.layers, *widths, seed=seed)
        self.to(student.device)

    def forward(self, input_ids: torch.Tensor, loss_mask: torch.Tensor, count: torch.Tensor | int | None = None) -> dict[str, torch.Tensor]:
        """int64 [batch, length] and bool [batch, length] (true: a target) -> {"loss", and each weighted term before its weight}.

        count  what sums over positions are divided by; None takes the targets of this batch
        """
        counted = loss_mask[:, 1:]
        divisor = counted.sum().clamp(min=1) if count is None else count
        student = look(self.student, input_ids, counted, self.layers.keys(), self.feature, max_logits=self.max_logits)
        said: tuple[torch.Tensor, ...] = ()
        teacher_blocks: dict[int, torch.Tensor] = {}
        if self.frozen:
            with torch.no_grad():
                teacher = look(self.frozen[0], input_ids, counted, self.layers.values(), self.feature, max_logits=self.max_logits)
            said, teacher_blocks = (teacher.last,), teacher.blocks
        elif self.cache is not None:
            said = self.cache.read(input_ids, loss_mask)
        terms: dict[str, torch.Tensor] = {}
        if self.alpha or self.beta:
            terms |= self._output_terms(student.last, said, input_ids[:, 1:][counted])
        if self.layers:
            distance = distance_of(self.feature)
            compared = [distance(self.projectors(s, student.blocks[s]), teacher_blocks[t]).sum() for s, t in self.layers.items()]
            terms["loss_feature"] = torch.stack(compared).mean()
        terms = {name: value / divisor for name, value in terms.items()}
        weights = {"loss_kd": self.alpha, "loss_task": self.beta, "loss_feature": self.gamma}
        return {"loss": torch.stack([weights[name] * value for name, value in terms.items()]).sum(), **terms}

    def extra_repr(self) -> str:
        """What decides the loss. Unfinished trainings are continued by this text, so it keeps the names it first had."""
        values = {
            "alpha": self.alpha, "beta": self.beta, "gamma": self.gamma, "temperature": self.temperature, "divergence": self.divergence,
            "mixture": self.jsd_beta, "feature": self.feature, "layers": self.layers, "cache": self.cache.settings if self.cache else None,
        }  # fmt: skip
        return ", ".join(f"{name}={value}" for name, value in values.items())

    def _output_terms(self, student: torch.Tensor, said: tuple[torch.Tensor, ...], targets: torch.Tensor) -> dict[str, torch.Tensor]:
        head = self.student.get_output_embeddings()

        def of_chunk(targets: torch.Tensor, student: torch.Tensor, *said: torch.Tensor) -> torch.Tensor:
            logits = head(student)
            sums = []
            if self.alpha and self.targets is not None:
                ours = log_probabilities(logits[:, : self.targets.vocabulary], self.temperature)
                ours, theirs = self.targets.compare(ours, *said)
                sums.append(kd_loss(ours, theirs, self.temperature, self.divergence, self.jsd_beta).sum())
            if self.beta:
                sums.append(cross_entropy(logits, targets).sum())
            return torch.stack(sums)

        sums = sum_in_chunks(of_chunk, max(1, self.max_logits // self.student.config.vocab_size), targets, student, *said)
        return dict(zip([name for name, weight in (("loss_kd", self.alpha), ("loss_task", self.beta)) if weight], sums, strict=True))


@torch.no_grad()
def _check_head(model: PreTrainedModel) -> None:
    """Raise Incompatible unless logits are the output head on the last hidden state (some architectures scale or cap them)."""
    if model.base_model is model:
        raise Incompatible(
            f"{type(model).__name__} does not tell transformers which of its parts gives the hidden states (base_model_prefix), and training "
            "reads the output head on them; this architecture cannot be trained yet",
            key="model",
        )
    tokens = torch.arange(min(8, model.config.vocab_size), device=model.device)[None]
    was_training = model.training
    model.eval()  # or dropout would tell the two apart
    expected = model(input_ids=tokens, use_cache=False).logits
    logits = model.get_output_embeddings()(model.base_model(input_ids=tokens, use_cache=False).last_hidden_state)
    model.train(was_training)
    if not torch.allclose(logits, expected, rtol=1e-3, atol=1e-3):
        raise Incompatible(
            f"{type(model).__name__} changes its logits after the output head, by up to {(logits - expected).abs().max():.3g}; "
            "training reads the head directly and does not take this architecture yet"
        )
