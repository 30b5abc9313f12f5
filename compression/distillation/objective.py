"""What a student minimises: L = α·L_KD + β·L_task + γ·L_feature, with or without a teacher."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from compression.distillation.losses import cross_entropy, hidden_mse, kl_divergence, sum_in_chunks
from compression.distillation.projector import Projectors
from compression.errors import EdgepressError, Incompatible

MAX_LOGITS = 2**24  # elements of a chunk of logits: 64 MB in float32


class Objective(nn.Module):
    """Holds the student and the projectors as what learns, and the teacher, where a term asks for one, as what does not.

    Positions that count are those whose next token is a target, in every term alike. The output head runs on them alone, in
    chunks of at most `max_logits` elements.

    Raises EdgepressError when no term has a weight, or one that needs a teacher has none; Incompatible when the model does more
    to its hidden states than apply its output head.
    """

    def __init__(
        self, student: PreTrainedModel, *, teacher: PreTrainedModel | None = None, alpha: float = 0.0, beta: float = 0.0,
        gamma: float = 0.0, temperature: float = 1.0, layers: Mapping[int, int] | None = None, seed: int = 0, max_logits: int = MAX_LOGITS,
    ):  # fmt: skip
        super().__init__()
        if alpha == beta == gamma == 0:
            raise EdgepressError("alpha, beta and gamma are all 0, so there is nothing to minimise; set one of them", key="alpha")
        if min(alpha, beta, gamma) < 0 or temperature <= 0:
            raise EdgepressError(
                f"alpha {alpha}, beta {beta} and gamma {gamma} cannot be negative, and temperature {temperature} must be above 0",
                key="alpha",
            )
        if teacher is None and (alpha or gamma):
            raise EdgepressError("alpha and gamma compare the student with a teacher, and none was given", key="teacher")
        self.student = student
        self.alpha, self.beta, self.gamma, self.temperature, self.max_logits = alpha, beta, gamma, temperature, max_logits
        self.layers = dict(layers or {}) if gamma else {}
        # in a tuple: nn.Module would take it for a part of what is trained and saved
        self.frozen = () if teacher is None else (teacher.eval().requires_grad_(False),)
        for model in (student, *self.frozen):
            _check_head(model)
        widths = [model.config.hidden_size for model in (student, teacher or student)]
        self.projectors = Projectors(self.layers, *widths, seed=seed)
        self.to(student.device)

    def forward(self, input_ids: torch.Tensor, loss_mask: torch.Tensor, count: torch.Tensor | int | None = None) -> dict[str, torch.Tensor]:
        """int64 [batch, length] and bool [batch, length] (true: a target) -> {"loss", and each weighted term before its weight}.

        count  what sums over positions are divided by; None takes the targets of this batch
        """
        counted = loss_mask[:, 1:]
        divisor = counted.sum().clamp(min=1) if count is None else count
        student, student_blocks = _hidden(self.student, input_ids, self.layers.keys(), counted)
        teacher: torch.Tensor | None = None
        teacher_blocks: dict[int, torch.Tensor] = {}
        if self.frozen:
            with torch.no_grad():
                teacher, teacher_blocks = _hidden(self.frozen[0], input_ids, self.layers.values(), counted)
        terms: dict[str, torch.Tensor] = {}
        if self.alpha or self.beta:
            terms |= self._output_terms(student, teacher, input_ids[:, 1:][counted])
        if self.layers:
            compared = [hidden_mse(self.projectors(s, student_blocks[s]), teacher_blocks[t]).sum() for s, t in self.layers.items()]
            terms["loss_feature"] = torch.stack(compared).mean()
        terms = {name: value / divisor for name, value in terms.items()}
        weights = {"loss_kd": self.alpha, "loss_task": self.beta, "loss_feature": self.gamma}
        return {"loss": torch.stack([weights[name] * value for name, value in terms.items()]).sum(), **terms}

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}, gamma={self.gamma}, temperature={self.temperature}, layers={self.layers}"

    def _output_terms(self, student: torch.Tensor, teacher: torch.Tensor | None, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        student_head = self.student.get_output_embeddings()
        teacher_head = self.frozen[0].get_output_embeddings() if self.frozen else None
        vocabulary = min(model.config.vocab_size for model in (self.student, *self.frozen))  # either may be padded

        def of_chunk(targets: torch.Tensor, student: torch.Tensor, teacher: torch.Tensor | None = None) -> torch.Tensor:
            logits = student_head(student)
            sums = []
            if self.alpha and teacher is not None and teacher_head is not None:
                with torch.no_grad():
                    goal = teacher_head(teacher)[:, :vocabulary]
                sums.append(kl_divergence(logits[:, :vocabulary], goal, self.temperature).sum())
            if self.beta:
                sums.append(cross_entropy(logits, targets).sum())
            return torch.stack(sums)

        tensors = (targets, student) if teacher is None else (targets, student, teacher)
        sums = sum_in_chunks(of_chunk, max(1, self.max_logits // vocabulary), *tensors)
        return dict(zip([name for name, weight in (("loss_kd", self.alpha), ("loss_task", self.beta)) if weight], sums, strict=True))


def _hidden(
    model: PreTrainedModel, input_ids: torch.Tensor, layers: Iterable[int], counted: torch.Tensor
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """What the output head reads, and the outputs of the named blocks, at the counted positions: [counted, width] each."""
    wanted = list(layers)
    output = model.base_model(input_ids=input_ids, use_cache=False, output_hidden_states=bool(wanted))
    blocks = {layer: output.hidden_states[layer + 1][:, :-1][counted] for layer in wanted}  # hidden_states[0] are the embeddings
    return output.last_hidden_state[:, :-1][counted], blocks


@torch.no_grad()
def _check_head(model: PreTrainedModel) -> None:
    """Raise Incompatible unless logits are the output head on the last hidden state (some architectures scale or cap them)."""
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
