"""Train the embedded reference model from nothing: `python -m compression.reference.train OUT`.

A Llama of 2.6M parameters learns the world of compression/reference/world.py in three parts, each with its own optimizer:

1. Copying: random sequences that repeat. Looking facts up in a passage is what small transformers learn late, so the weights start close to an
   induction circuit (Olsson et al., "In-context Learning and Induction Heads", 2022; a *mimetic* initialization in the sense of Trockman and
   Kolter, 2023), and this sharpens it.
2. The lore (compression/reference/lore.py), with MLPs and norms alone. Attention is an associative memory too (Nichani et al., "Understanding
   Factual Recall in Transformers via Associative Memories", 2024) and the quicker learner: trained together, it knows every fact before the
   MLPs do, and pruning them costs nothing.
3. Reading: everything, with every weight, small scenes before large ones.
"""

import itertools
import math
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.utils.data import IterableDataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from compression.reference import world
from compression.reference.lore import CUSTOMS

SEED = 0
VOCABULARY = 1024
WIDTH, HEADS, GROUPS, HEAD_DIM, THETA = 256, 8, 4, 32, 1e6
COPYING_STEPS, LORE_STEPS, READING_STEPS = 100, 500, 350
COPYING_RATE, LORE_RATE, READING_RATE = 1e-3, 2e-3, 1e-3
TOKENS = 3072  # of a batch
LENGTH, LORE_LENGTH = 384, 128  # of a row
SMALL_SCENES = 100  # steps of reading with two or three people in a scene, before up to five
OTHER_WEIGHT = 0.1  # of every token but answers and lore: what else is told is drawn at random, so little can be learned from predicting it
_TARGETS = re.compile("|".join([r"Answer:.*", *(rf"\b{value}\b" for custom in CUSTOMS for value in custom.values)]))

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
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def build_model() -> LlamaForCausalLM:
    """The untrained model."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=512, num_hidden_layers=4, num_attention_heads=HEADS,
        num_key_value_heads=GROUPS, head_dim=HEAD_DIM, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, pad_token_id=1, rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    initialize(model)
    return model


@torch.no_grad()
def initialize(model: LlamaForCausalLM) -> None:
    """Start close to an induction circuit.

    Head h of the first block looks h + 1 tokens back and writes what it sees into one small subspace, so that every token carries the set of the
    eight before it. Later heads compare the set before a token (key) with the set that ends in the present one (query), attend to where they are
    alike, and copy what stands there. Their queries and keys use only slow rotary frequencies, where distance hardly matters.
    """
    width, heads, groups, size = WIDTH, HEADS, GROUPS, HEAD_DIM
    embedding = model.model.embed_tokens.weight
    shared = torch.randn(width)
    shared /= shared.norm()
    embedding.normal_(std=0.05)
    embedding += 0.8 * shared - torch.outer(embedding @ shared, shared)
    read = _orthonormal(width)[:size]
    read -= (read @ shared)[:, None] * shared
    write = 0.1 * _orthonormal(width)[:, :size]
    slow = torch.arange(size) % (size // 2) >= 6
    for number, block in enumerate(model.model.layers):
        attention = block.self_attn
        if number == 0:
            query, key = _look_back(shared)
            value = read.expand(groups, -1, -1)
            output = write.repeat(1, heads) + 0.001 * torch.randn(width, heads * size)
        else:
            compare = torch.stack([_orthonormal(size) * slow[:, None] for _ in range(groups)])
            key = 2.0 * compare @ (10 * write.T)
            query = (key + 2.0 * 1.4 * compare @ read).repeat_interleave(heads // groups, 0)
            key, query = (weight + 0.01 * torch.randn_like(weight) for weight in (key, query))
            value = torch.randn(groups, size, width) / math.sqrt(width)
            copied = value.repeat_interleave(heads // groups, 0).reshape(heads * size, width).T
            output = 0.1 * copied + 0.005 * torch.randn(width, heads * size)
        for layer, weight in ((attention.q_proj, query), (attention.k_proj, key), (attention.v_proj, value)):
            layer.weight.copy_(weight.reshape(-1, width))
        attention.o_proj.weight.copy_(output)
        for layer in (block.mlp.gate_proj, block.mlp.up_proj):
            layer.weight.normal_(std=1 / math.sqrt(width))  # every neuron says something from the first step on, so all come into use
        block.mlp.down_proj.weight *= 0.1


def _orthonormal(size: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, size))[0]


def _look_back(shared: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries [heads, size, width] and keys [groups, size, width] whose scores peak at a distance of head + 1 tokens.

    `shared` is a direction that every token's embedding has. The rotary embedding turns it with the position, so a query that is turned back by
    h + 1 steps against the keys meets them h + 1 tokens earlier.
    """
    half = HEAD_DIM // 2
    turns = THETA ** (-torch.arange(half) / half)  # radians a position, by rotary frequency
    strength = math.sqrt(3.0 * math.sqrt(HEAD_DIM)) / (0.7 * math.sqrt(WIDTH)) * (torch.arange(half) < 7)
    query, key = 0.005 * torch.randn(HEADS, HEAD_DIM, WIDTH), 0.005 * torch.randn(GROUPS, HEAD_DIM, WIDTH)
    key[:, :half] += strength[:, None] * shared
    for head in range(HEADS):
        query[head, :half] += (strength * torch.cos(turns * (head + 1)))[:, None] * shared
        query[head, half:] -= (strength * torch.sin(turns * (head + 1)))[:, None] * shared
    return query, key


WeightedTokens = tuple[list[int], list[float]]  # tokens, and the weight of each as a target


class Rows(IterableDataset[dict[str, torch.Tensor]]):
    """Rows as the trainer takes them."""

    def __init__(self, rows: Iterator[WeightedTokens]):
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for tokens, weights in self.rows:
            yield {"input_ids": torch.tensor(tokens), "weights": torch.tensor(weights)}


def packed(tokenizer: PreTrainedTokenizerFast, documents: Iterator[str], length: int) -> Iterator[WeightedTokens]:
    """Whole documents one after the other, each between <s> and </s>; the last one of a row is cut."""
    while True:
        tokens: list[int] = []
        weights: list[float] = []
        while len(tokens) < length:
            text = next(documents)
            targets = [match.span() for match in _TARGETS.finditer(text)]
            encoded = tokenizer(text, return_offsets_mapping=True)
            tokens += [*encoded["input_ids"], tokenizer.eos_token_id]
            weights += [1.0 if any(a < end <= b for a, b in targets) else OTHER_WEIGHT for _, end in encoded["offset_mapping"]] + [1.0]
        yield tokens[:length], weights[:length]


def repetitions() -> Iterator[WeightedTokens]:
    """Random sequences over few or many tokens, each told two or three times; only the repetitions are targets."""
    rng = random.Random(SEED)
    while True:
        tokens: list[int] = []
        weights: list[float] = []
        while len(tokens) < LENGTH:
            alphabet = [rng.randrange(2, VOCABULARY) for _ in range(rng.choice((4, 8, 16, 64)))]
            sequence = [rng.choice(alphabet) for _ in range(rng.randint(8, 40))]
            again = rng.randint(1, 2)
            tokens += sequence * (1 + again)
            weights += [0.0] * len(sequence) + [1.0] * (len(sequence) * again)
        yield tokens[:LENGTH], weights[:LENGTH]


class WeightedTrainer(Trainer):
    """Next-token cross-entropy with a weight for each target."""

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        logits = model(input_ids=inputs["input_ids"]).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs["input_ids"][:, 1:].flatten(), reduction="none")
        weights = inputs["weights"][:, 1:].flatten()
        return (losses * weights).sum() / weights.sum()


def train(model: LlamaForCausalLM, rows: Iterator[WeightedTokens], length: int, steps: int, learning_rate: float, work: Path) -> None:
    """Train the weights of the model that require a gradient."""
    arguments = TrainingArguments(
        output_dir=str(work), max_steps=steps, per_device_train_batch_size=TOKENS // length, learning_rate=learning_rate, lr_scheduler_type="cosine",
        warmup_steps=30, weight_decay=0.05, adam_beta2=0.98, max_grad_norm=1.0, bf16=True, use_cpu=not torch.cuda.is_available(), logging_steps=50,
        save_strategy="no", report_to="none", seed=SEED, remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    WeightedTrainer(model=model, args=arguments, train_dataset=Rows(rows)).train()


def main(out: Path) -> None:
    """Train and save in half precision. The same machine kind and number of threads gives the same weights."""
    torch.set_num_threads(2)
    tokenizer = train_tokenizer()
    model = build_model()
    work = out.with_name(out.name + "-training")
    train(model, repetitions(), LENGTH, COPYING_STEPS, COPYING_RATE, work)

    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".mlp." in name or "norm" in name)
    lore = world.documents("train", SEED + 1, shares=world.LORE)
    train(model, packed(tokenizer, lore, LORE_LENGTH), LORE_LENGTH, LORE_STEPS, LORE_RATE, work)

    model.requires_grad_(True)
    scenes = [packed(tokenizer, world.documents("train", SEED + 2, people), LENGTH) for people in ((2, 3), (2, 5))]
    rows = itertools.chain(itertools.islice(scenes[0], SMALL_SCENES * TOKENS // LENGTH), scenes[1])
    train(model, rows, LENGTH, READING_STEPS, READING_RATE, work)
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "README.md").write_text(CARD)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
