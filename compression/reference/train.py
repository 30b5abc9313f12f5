"""Train the embedded reference model from nothing: `python -m compression.reference.train OUT`.

A Llama of 4.1M parameters learns the world of compression/reference/world.py in well under an hour on two cores. Looking facts up in a passage
is what small transformers learn late, so three things help it on its way: the weights start close to an induction circuit (Olsson et al.,
"In-context Learning and Induction Heads", 2022; a *mimetic* initialization in the sense of Trockman and Kolter, 2023), the first rows are
random sequences to be repeated, and small scenes come before large ones. Every weight is trained afterwards.
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
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from compression.reference import world
from compression.reference.lore import CUSTOMS

SEED = 0
VOCABULARY = 1024
WIDTH, HEADS, GROUPS, HEAD_DIM, THETA = 256, 8, 4, 32, 1e6
LENGTH, ROWS, STEPS, LEARNING_RATE = 384, 8, 1600, 1e-3
DECAY = 400  # last steps, in which the learning rate falls to 0; it is constant before
COPYING = 100  # steps on random sequences, before everything else
SCENES = ((200, (2, 2)), (400, (2, 3)), (STEPS, (2, 5)))  # until this step: fewest and most people of a scene
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


Row = tuple[list[int], list[float]]  # tokens, and the weight of each as a target


class Rows(IterableDataset[dict[str, torch.Tensor]]):
    """The curriculum: random sequences with their repetitions, then packed documents of ever larger scenes."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer = tokenizer

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        sources = [(until, world.documents("train", SEED + 1 + n, people)) for n, (until, people) in enumerate(SCENES)]
        rng = random.Random(SEED)
        for number in range(STEPS * ROWS):
            documents = next(source for until, source in sources if number < until * ROWS)
            tokens, weights = _repetitions(rng) if number < COPYING * ROWS else self._packed(documents)
            yield {"input_ids": torch.tensor(tokens[:LENGTH]), "weights": torch.tensor(weights[:LENGTH])}

    def _packed(self, documents: Iterator[str]) -> Row:
        """Whole documents one after the other, each between <s> and </s>; the last one is cut."""
        tokens: list[int] = []
        weights: list[float] = []
        while len(tokens) < LENGTH:
            text = next(documents)
            targets = [match.span() for match in _TARGETS.finditer(text)]
            encoded = self.tokenizer(text, return_offsets_mapping=True)
            tokens += [*encoded["input_ids"], self.tokenizer.eos_token_id]
            weights += [1.0 if any(a <= start < b for a, b in targets) else OTHER_WEIGHT for start, _ in encoded["offset_mapping"]] + [1.0]
        return tokens, weights


def _repetitions(rng: random.Random) -> Row:
    """Random sequences over few or many tokens, each told two or three times; only the repetitions are targets."""
    tokens: list[int] = []
    weights: list[float] = []
    while len(tokens) < LENGTH:
        alphabet = [rng.randrange(2, VOCABULARY) for _ in range(rng.choice((4, 8, 16, 64)))]
        sequence = [rng.choice(alphabet) for _ in range(rng.randint(8, 40))]
        again = rng.randint(1, 2)
        tokens += sequence * (1 + again)
        weights += [0.0] * len(sequence) + [1.0] * (len(sequence) * again)
    return tokens, weights


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


def main(out: Path) -> None:
    """Train and save in half precision. The same machine kind and number of threads gives the same weights."""
    torch.set_num_threads(2)
    tokenizer = train_tokenizer()
    model = build_model()
    arguments = TrainingArguments(
        output_dir=str(out.with_name(out.name + "-training")), max_steps=STEPS, per_device_train_batch_size=ROWS, learning_rate=LEARNING_RATE,
        lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs={"num_decay_steps": DECAY}, warmup_steps=50,
        weight_decay=0.05, adam_beta2=0.98, max_grad_norm=1.0, bf16=True, use_cpu=not torch.cuda.is_available(), logging_steps=100,
        save_steps=500, save_total_limit=1, report_to="none", seed=SEED, remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    WeightedTrainer(model=model, args=arguments, train_dataset=Rows(tokenizer)).train()
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "README.md").write_text(CARD)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
