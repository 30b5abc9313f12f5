"""What a student minimises: L = α·L_KD + β·L_task + γ·L_feature, with or without a teacher."""

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from compression.distillation.features import distance_of, extract_features, prepare
from compression.distillation.losses import MAX_LOGITS, cross_entropy, kd_loss, log_probabilities, sum_in_chunks
from compression.distillation.projector import Projectors
from compression.distillation.settings import ObjectiveSettings
from compression.distillation.targets import HeadTargets, Targets
from compression.distillation.teacher_cache import TeacherCache
from compression.errors import EdgepressError, Incompatible


class Objective(nn.Module):
    """Holds the student and the projectors, which learn, and the teacher, where a term needs one, which does not.

    Positions that count are those whose next token is a target, in every term alike. The output head runs on them alone, in
    chunks of at most `max_logits` elements.

    Args:
        student: The model that learns.
        settings: The terms and their weights.
        teacher: The model to learn from; or
        cache: its outputs on the training rows, enough for alpha.
        layers: The pairs of student block -> teacher block that gamma compares.
        seed: Of the projectors.
        max_logits: Elements of logits that are alive at once.

    Raises:
        EdgepressError: No term has a weight, or a term that needs a teacher has none.
        Incompatible: The model does more to its hidden states than apply its output head.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        settings: ObjectiveSettings,
        *,
        teacher: PreTrainedModel | None = None,
        cache: TeacherCache | None = None,
        layers: Mapping[int, int] | None = None,
        seed: int = 0,
        max_logits: int = MAX_LOGITS,
    ):
        super().__init__()
        if settings.alpha == settings.beta == settings.gamma == 0:
            raise EdgepressError("alpha, beta and gamma are all 0, so there is nothing to minimise; set one of them", key="alpha")
        if (settings.alpha and teacher is None and cache is None) or (settings.gamma and teacher is None):
            raise EdgepressError("alpha and gamma compare the student with a teacher, and there is none", key="teacher")
        if cache is not None and (teacher is not None or cache.temperature != settings.temperature):
            raise EdgepressError(
                f"a cache at temperature {cache.temperature} stands for a teacher at that temperature: pass the cache alone, and the same temperature",
                key="teacher_cache",
            )
        self.student = student
        self.settings, self.max_logits = settings, max_logits
        self.layers = dict(layers or {}) if settings.gamma else {}
        # In a tuple: nn.Module would treat it as a part of what is trained and saved.
        self.frozen = () if teacher is None else (teacher.eval().requires_grad_(False),)
        for model in (student, *self.frozen):
            _check_head(model)
            if self.layers:
                prepare(model, settings.feature)
        self.cache = cache
        self.targets: Targets | None = cache.targets if cache else None
        if teacher is not None:
            vocabulary = min(student.config.vocab_size, teacher.config.vocab_size)
            self.targets = HeadTargets(teacher.get_output_embeddings(), vocabulary, settings.temperature)
        widths = [model.config.hidden_size for model in (student, teacher or student)]
        self.projectors = Projectors({} if settings.feature == "attention" else self.layers, *widths, seed=seed)
        self.to(student.device)

    def forward(self, input_ids: torch.Tensor, loss_mask: torch.Tensor, count: torch.Tensor | int | None = None) -> dict[str, torch.Tensor]:
        """Return "loss", and each term that has a weight, before its weight.

        Args:
            input_ids: int64 [batch, length].
            loss_mask: bool [batch, length], true where a token is a target.
            count: The divisor of sums over positions; None takes the targets of this batch.
        """
        counted = loss_mask[:, 1:]
        divisor = counted.sum().clamp(min=1) if count is None else count
        student = extract_features(self.student, input_ids, counted, self.layers.keys(), self.settings.feature, max_logits=self.max_logits)
        teacher_outputs: tuple[torch.Tensor, ...] = ()
        teacher_blocks: dict[int, torch.Tensor] = {}
        if self.frozen:
            with torch.no_grad():
                teacher = extract_features(
                    self.frozen[0], input_ids, counted, self.layers.values(), self.settings.feature, max_logits=self.max_logits
                )
            teacher_outputs, teacher_blocks = (teacher.last,), teacher.blocks
        elif self.cache is not None:
            teacher_outputs = self.cache.read(input_ids, loss_mask)
        terms: dict[str, torch.Tensor] = {}
        if self.settings.alpha or self.settings.beta:
            terms |= self._output_terms(student.last, teacher_outputs, input_ids[:, 1:][counted])
        if self.layers:
            distance = distance_of(self.settings.feature)
            compared = [distance(self.projectors(s, student.blocks[s]), teacher_blocks[t]).sum() for s, t in self.layers.items()]
            terms["loss_feature"] = torch.stack(compared).mean()
        terms = {name: value / divisor for name, value in terms.items()}
        weights = {"loss_kd": self.settings.alpha, "loss_task": self.settings.beta, "loss_feature": self.settings.gamma}
        return {"loss": torch.stack([weights[name] * value for name, value in terms.items()]).sum(), **terms}

    def extra_repr(self) -> str:
        """Describe what decides the loss. Fingerprints of unfinished trainings contain this text, so it keeps the names it first had."""
        first_names = {"jsd_beta": "mixture"}
        values = {first_names.get(name, name): getattr(self.settings, name) for name in ObjectiveSettings.model_fields}
        values |= {"layers": self.layers, "cache": self.cache.settings if self.cache else None}
        return ", ".join(f"{name}={value}" for name, value in values.items())

    def _output_terms(self, student: torch.Tensor, teacher: tuple[torch.Tensor, ...], targets: torch.Tensor) -> dict[str, torch.Tensor]:
        head, settings = self.student.get_output_embeddings(), self.settings

        def of_chunk(targets: torch.Tensor, student: torch.Tensor, *teacher: torch.Tensor) -> torch.Tensor:
            logits = head(student)
            sums = []
            if settings.alpha and self.targets is not None:
                ours = log_probabilities(logits[:, : self.targets.vocabulary], settings.temperature)
                ours, theirs = self.targets.compare(ours, *teacher)
                sums.append(kd_loss(ours, theirs, settings.temperature, settings.divergence, settings.jsd_beta).sum())
            if settings.beta:
                sums.append(cross_entropy(logits, targets).sum())
            return torch.stack(sums)

        sums = sum_in_chunks(of_chunk, max(1, self.max_logits // self.student.config.vocab_size), targets, student, *teacher)
        return dict(
            zip([name for name, weight in (("loss_kd", settings.alpha), ("loss_task", settings.beta)) if weight], sums, strict=True)
        )


@torch.no_grad()
def _check_head(model: PreTrainedModel) -> None:
    """Raise Incompatible unless logits are the output head on the last hidden state (some architectures scale or cap them)."""
    if model.base_model is model:
        raise Incompatible(
            f"{type(model).__name__} does not name the part that computes its hidden states (base_model_prefix), and training "
            "reads the output head on them; this architecture cannot be trained yet",
            key="model",
        )
    tokens = torch.arange(min(8, model.config.vocab_size), device=model.device)[None]
    was_training = model.training
    model.eval()  # otherwise dropout makes the two differ
    expected = model(input_ids=tokens, use_cache=False).logits
    logits = model.get_output_embeddings()(model.base_model(input_ids=tokens, use_cache=False).last_hidden_state)
    model.train(was_training)
    if not torch.allclose(logits, expected, rtol=1e-3, atol=1e-3):
        raise Incompatible(
            f"{type(model).__name__} changes its logits after the output head, by up to {(logits - expected).abs().max():.3g}; "
            "training reads the head directly and does not take this architecture yet"
        )
