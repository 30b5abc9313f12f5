"""Features of a model's blocks for L_feature, at the positions that count: hidden states, attention maps, gradients."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from compression.distillation.losses import attention_distance, cosine_distance, cross_entropy, mean_squares, sum_in_chunks
from compression.distillation.settings import Feature
from compression.errors import Incompatible


@dataclass(frozen=True)
class BlockFeatures:
    """Features from one forward pass of a model.

    Attributes:
        last: The input of the output head, [counted, width].
        blocks: By block, [counted, features] each.
    """

    last: torch.Tensor
    blocks: dict[int, torch.Tensor]


def distance_of(feature: Feature) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return the distance between the features of a student's block and of a teacher's block."""
    if feature == "hidden_mse":
        return mean_squares
    return attention_distance if feature == "attention" else cosine_distance


def prepare(model: PreTrainedModel, feature: Feature) -> None:
    """Switch to `eager` attention where needed: only it returns attention maps and can be differentiated twice."""
    if feature in ("attention", "gradient"):
        model.set_attn_implementation("eager")


def extract_features(
    model: PreTrainedModel, input_ids: torch.Tensor, counted: torch.Tensor, layers: Iterable[int], feature: Feature, *, max_logits: int
) -> BlockFeatures:  # fmt: skip
    """Run the model and return features of its blocks at the counted positions.

    Args:
        model: The student or the teacher.
        input_ids: int64 [batch, length].
        counted: bool [batch, length - 1], true where the next token is a target.
        layers: The blocks whose features are needed.
        feature: hidden_mse, hidden_cosine: outputs of the blocks, [counted, width]; of the last block after the final norm.
            attention: attention maps averaged over heads, a row for each counted query, [counted, length].
            gradient: G = ∂ Σ cross-entropy / ∂ output of the block, [counted, width]: how the task loss responds to a change there;
            a student's G is differentiable itself. Wang et al., "Gradient Knowledge Distillation for Pre-trained Language Models"
            (arXiv 2211.01071) compare unit gradients as here (their squared distance is twice the cosine distance), of a
            classifier's confidence at its embeddings.
        max_logits: Elements of logits that are alive at once (gradient).

    Raises:
        Incompatible: The model does not return its attention maps.
    """
    wanted = list(layers)
    if wanted and feature == "gradient":
        return _with_gradients(model, input_ids, counted, wanted, max_logits)
    maps = bool(wanted) and feature == "attention"
    output = model.base_model(
        input_ids=input_ids, use_cache=False, output_hidden_states=bool(wanted) and not maps, output_attentions=maps
    )  # fmt: skip
    if maps and not output.attentions:
        raise Incompatible(f"{type(model).__name__} does not return its attention maps; compare hidden states instead", key="feature")
    features = {layer: output.attentions[layer].mean(1) if maps else output.hidden_states[layer + 1] for layer in wanted}
    return BlockFeatures(_at(output.last_hidden_state, counted), {layer: _at(states, counted) for layer, states in features.items()})


def _with_gradients(
    model: PreTrainedModel, input_ids: torch.Tensor, counted: torch.Tensor, layers: list[int], max_logits: int
) -> BlockFeatures:
    trained = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in model.parameters())
    with torch.enable_grad():  # also where a teacher or a validation loss is computed
        embedded = model.get_input_embeddings()(input_ids)
        if not embedded.requires_grad:  # a frozen model has no other tensor that requires a gradient
            embedded = embedded.detach().requires_grad_()
        output = model.base_model(inputs_embeds=embedded, use_cache=False, output_hidden_states=True)
        last, targets = _at(output.last_hidden_state, counted), input_ids[:, 1:][counted]
        head = model.get_output_embeddings()
        loss = sum_in_chunks(
            lambda hidden, chosen: cross_entropy(head(hidden), chosen).sum(), max(1, max_logits // model.config.vocab_size), last, targets
        )  # fmt: skip
        states = [output.hidden_states[layer + 1] for layer in layers]
        gradients = torch.autograd.grad(loss, states, create_graph=trained)
    features = {layer: _at(gradient, counted) for layer, gradient in zip(layers, gradients, strict=True)}
    return BlockFeatures(last if trained else last.detach(), features)


def _at(states: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Select the counted positions. A position predicts the token after it, so the last one of a row predicts nothing."""
    return states[:, :-1][counted]
