"""What a model shows inside for L_feature, at the positions that count: hidden states, attention maps, gradients."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from compression.distillation.compatibility import Feature
from compression.distillation.losses import attention_distance, cosine_distance, cross_entropy, mean_squares, sum_in_chunks
from compression.errors import Incompatible


@dataclass(frozen=True)
class BlockFeatures:
    """One forward pass of a model.

    last    what the output head reads, [counted, width]
    blocks  what the named blocks show, [counted, features] each
    """

    last: torch.Tensor
    blocks: dict[int, torch.Tensor]


def distance_of(feature: Feature) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The loss between what a student's block and a teacher's block show."""
    if feature == "hidden_mse":
        return mean_squares
    return attention_distance if feature == "attention" else cosine_distance


def prepare(model: PreTrainedModel, feature: Feature) -> None:
    """Attention maps are made, and gradients differentiated once more, by plain matrix products only (`eager`)."""
    if feature in ("attention", "gradient"):
        model.set_attn_implementation("eager")


def look(
    model: PreTrainedModel, input_ids: torch.Tensor, counted: torch.Tensor, layers: Iterable[int], feature: Feature, *, max_logits: int
) -> BlockFeatures:  # fmt: skip
    """Run the model on int64 [batch, length] and show its blocks at `counted`, bool [batch, length - 1].

    hidden_mse, hidden_cosine  outputs of the blocks, [counted, width]; of the last one after the final norm
    attention                  attention maps averaged over heads, a row for each counted query: [counted, length]
    gradient                   G = ∂ Σ cross-entropy / ∂ output of the block, [counted, width]: how the task loss would answer to a change
                               there; a student's G is differentiable itself. Wang et al., "Gradient Knowledge Distillation for
                               Pre-trained Language Models" (arXiv 2211.01071) compare unit gradients as here (their squared
                               distance is twice the cosine distance), of a classifier's confidence at its embeddings

    Raises Incompatible for a model that does not tell its attention maps.
    """
    wanted = list(layers)
    if wanted and feature == "gradient":
        return _with_gradients(model, input_ids, counted, wanted, max_logits)
    maps = bool(wanted) and feature == "attention"
    output = model.base_model(
        input_ids=input_ids, use_cache=False, output_hidden_states=bool(wanted) and not maps, output_attentions=maps
    )  # fmt: skip
    if maps and not output.attentions:
        raise Incompatible(f"{type(model).__name__} does not tell its attention maps; compare hidden states instead", key="feature")
    shown = {layer: output.attentions[layer].mean(1) if maps else output.hidden_states[layer + 1] for layer in wanted}
    return BlockFeatures(_at(output.last_hidden_state, counted), {layer: _at(states, counted) for layer, states in shown.items()})


def _with_gradients(
    model: PreTrainedModel, input_ids: torch.Tensor, counted: torch.Tensor, layers: list[int], max_logits: int
) -> BlockFeatures:
    trained = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in model.parameters())
    with torch.enable_grad():  # also where a teacher or a validation loss is computed
        embedded = model.get_input_embeddings()(input_ids)
        if not embedded.requires_grad:  # a frozen model has no other tensor that asks for a gradient
            embedded = embedded.detach().requires_grad_()
        output = model.base_model(inputs_embeds=embedded, use_cache=False, output_hidden_states=True)
        last, targets = _at(output.last_hidden_state, counted), input_ids[:, 1:][counted]
        head = model.get_output_embeddings()
        loss = sum_in_chunks(
            lambda hidden, chosen: cross_entropy(head(hidden), chosen).sum(), max(1, max_logits // model.config.vocab_size), last, targets
        )  # fmt: skip
        states = [output.hidden_states[layer + 1] for layer in layers]
        gradients = torch.autograd.grad(loss, states, create_graph=trained)
    shown = {layer: _at(gradient, counted) for layer, gradient in zip(layers, gradients, strict=True)}
    return BlockFeatures(last if trained else last.detach(), shown)


def _at(states: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """A position predicts the token after it, so the last one of a row predicts nothing."""
    return states[:, :-1][counted]
