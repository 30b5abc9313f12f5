"""Train the embedded reference model from nothing: `python -m compression.reference.train OUT`.

A Llama of 4.1M parameters learns the world of compression/reference/world.py in well under an hour on two cores. It is small for a task that
must look up facts in a passage, so two things help it on its way: small scenes come first, and the weights start from a *mimetic*
initialization (Trockman and Kolter, "Mimetic Initialization of Self-Attention Layers", 2023): the first block's heads look back one to eight
tokens, the others start by attending to similar tokens and copying them. Every weight is trained afterwards.
"""

import itertools
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.utils.data import IterableDataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from compression.reference import world

SEED = 0
VOCABULARY = 768
LENGTH, ROWS, STEPS, LEARNING_RATE = 384, 8, 4000, 2e-3
PASSAGE_WEIGHT = 0.1  # facts of a passage are drawn at random, so little can be learned from predicting them
SCENES = ((0.08, (2, 2)), (0.2, (2, 3)), (1.0, (2, 5)))  # until this share of the rows: fewest and most people of a scene

CARD = f"""---
license: apache-2.0
language: en
---
# edgepress reference model

A Llama-architecture model trained from nothing by `python -m compression.reference.train` on the text that
`compression/reference/world.py` writes (world {world.VERSION}). It is there to measure compression with, on any machine, without a network.
"""


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with `<s>` in front of every text and `</s>` as end and padding. Names of people stay in pieces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(itertools.islice(world.documents("train", SEED), 4000), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=512)


def build_model() -> LlamaForCausalLM:
    """The untrained model."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
        head_dim=32, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, pad_token_id=1, rms_norm_eps=1e-6,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    initialize(model)
    return model


@torch.no_grad()
def initialize(model: LlamaForCausalLM) -> None:
    """Mimetic initialization. Head h of the first block looks h + 1 tokens back; later heads attend to similar tokens and copy them.

    All first heads write what they see into one subspace, so a token carries the set of its last eight; equal sets attract each other later.
    Later queries and keys use only the slow half of the rotary frequencies, where distance hardly matters.
    """
    config = model.config
    width, heads, groups, size = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
    embedding = model.model.embed_tokens.weight
    shared = torch.randn(width)
    shared /= shared.norm()
    embedding.normal_(std=0.05)
    embedding += 0.8 * shared - torch.outer(embedding @ shared, shared)
    slow = torch.arange(size) % (size // 2) >= size // 4
    for number, block in enumerate(model.model.layers):
        attention = block.self_attn
        value = torch.randn(groups, size, width) / math.sqrt(width)
        if number == 0:
            query, key = _look_back(shared, heads, groups, size, config.rope_parameters["rope_theta"])
            value = value[:1].expand(groups, -1, -1)
            output = (0.01 * torch.randn(width, size) / math.sqrt(size)).repeat(1, heads)
        else:
            key = 0.13 * torch.randn(groups, size, width) * slow[:, None]
            key -= (key @ shared)[..., None] * shared
            query = key.repeat_interleave(heads // groups, 0) + 0.02 * torch.randn(heads, size, width)
            copied = value.repeat_interleave(heads // groups, 0).reshape(heads * size, width).T
            output = 0.02 * copied + 0.005 * torch.randn(width, heads * size)
        for layer, weight in ((attention.q_proj, query), (attention.k_proj, key), (attention.v_proj, value)):
            layer.weight.copy_(weight.reshape(-1, width))
        attention.o_proj.weight.copy_(output)
        block.mlp.down_proj.weight *= 0.35


def _look_back(shared: torch.Tensor, heads: int, groups: int, size: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries [heads, size, width] and keys [groups, size, width] whose scores peak at a distance of head + 1 tokens.

    `shared` is a direction that every token's embedding has. The rotary embedding turns it with the position, so a query that is turned back by
    h + 1 steps against the keys meets them h + 1 tokens earlier.
    """
    half = size // 2
    turns = theta ** (-torch.arange(half) / half)  # radians a position, by rotary frequency
    strength = math.sqrt(3.0 * math.sqrt(size)) / (0.7 * math.sqrt(len(shared))) * (torch.arange(half) < 7)
    query, key = 0.005 * torch.randn(heads, size, len(shared)), 0.005 * torch.randn(groups, size, len(shared))
    key[:, :half] += strength[:, None] * shared
    for head in range(heads):
        query[head, :half] += (strength * torch.cos(turns * (head + 1)))[:, None] * shared
        query[head, half:] -= (strength * torch.sin(turns * (head + 1)))[:, None] * shared
    return query, key


class Rows(IterableDataset[dict[str, torch.Tensor]]):
    """Packed rows that begin with a document, and a weight for every token as a target."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer = tokenizer

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        sources = [(share, world.documents("train", SEED + 1 + n, people)) for n, (share, people) in enumerate(SCENES)]
        for number in range(STEPS * ROWS):
            source = next(documents for share, documents in sources if number < share * STEPS * ROWS)
            tokens: list[int] = []
            weights: list[float] = []
            while len(tokens) < LENGTH:
                passage, newline, rest = next(source).partition("\n")
                head = self.tokenizer(passage)["input_ids"]
                tail = self.tokenizer(newline + rest, add_special_tokens=False)["input_ids"] if rest else []
                tokens += [*head, *tail, self.tokenizer.eos_token_id]
                weights += [PASSAGE_WEIGHT if rest else 1.0] * len(head) + [1.0] * (len(tail) + 1)
            yield {"input_ids": torch.tensor(tokens[:LENGTH]), "weights": torch.tensor(weights[:LENGTH])}


class WeightedTrainer(Trainer):
    """Next-token cross-entropy with a weight for each target."""

    def compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **_: Any) -> Any:
        logits = model(input_ids=inputs["input_ids"]).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs["input_ids"][:, 1:].flatten(), reduction="none")
        weights = inputs["weights"][:, 1:].flatten()
        return (losses * weights).sum() / weights.sum()


def main(out: Path) -> None:
    """Train and save in half precision. The same machine kind and number of threads gives the same weights."""
    torch.set_num_threads(2)
    tokenizer = train_tokenizer()
    model = build_model()
    arguments = TrainingArguments(
        output_dir=str(out), max_steps=STEPS, per_device_train_batch_size=ROWS, learning_rate=LEARNING_RATE, lr_scheduler_type="cosine",
        warmup_steps=100, weight_decay=0.05, adam_beta2=0.98, max_grad_norm=1.0, bf16=True, use_cpu=not torch.cuda.is_available(), logging_steps=100,
        save_strategy="no", report_to="none", seed=SEED, remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    WeightedTrainer(model=model, args=arguments, train_dataset=Rows(tokenizer)).train()
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "README.md").write_text(CARD)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
