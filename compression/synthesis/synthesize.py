"""A corpus that a model writes itself: sampled documents, none of them twice."""

import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from compression.checkpoints.checkpoint import file_digests
from compression.checkpoints.loading import load_model, load_tokenizer
from compression.context import Context
from compression.data.rows import start_token
from compression.errors import UnusableData, UnusableModel
from compression.resumption import fingerprint, latest_checkpoint, write_checkpoint
from compression.synthesis.settings import CORPUS, SynthesisSettings

COUNTS = "corpus.json"
LEAST_YIELD = 0.1  # share of the sampled documents that must be worth keeping, or the model has no more to say ...
PATIENCE = 10  # ... once so many batches were sampled


def synthesize(
    model: Path, out: Path, *, settings: SynthesisSettings, prompts: Sequence[Sequence[int]] | None = None, workdir: Path, context: Context,
    save_seconds: float = 60.0,
) -> dict[str, float]:  # fmt: skip
    """Sample documents from a checkpoint into `out`: corpus.jsonl, {"text": ...} a line, and corpus.json, the counts.

    prompts       beginnings of documents (`compression.data.rows.prompts_of`), all of one length, taken in an order drawn from the seed, again and again;
                  None lets the model begin
    save_seconds  between savings in `workdir`, from which a killed run goes on

    Blank texts, those of fewer than min_tokens written tokens, and exact repetitions are dropped and counted. A batch draws from a
    generator of its own, seeded by the context's seed and its number, so a run that went on ends in the same bytes.
    Returns the counts: documents and tokens kept, sampled, duplicates, too_short, cut (kept ones that met `length` before an end).
    Raises UnusableData for prompts of several lengths, UnusableModel for a tokenizer without BOS and EOS or a model that wrote nothing to
    keep, EdgepressError for prompts that leave no room.
    """
    beginnings = [list(prompt) for prompt in prompts] if prompts is not None else [[]]
    if len({len(prompt) for prompt in beginnings}) != 1:
        raise UnusableData("prompts are to be of one length, and at least one is needed", key="prompt_tokens")
    settings.check_prompts(len(beginnings[0]))
    tokenizer, network = load_tokenizer(model), load_model(model, device=context.device)
    start, ends = start_token(tokenizer), _end_tokens(network, tokenizer)
    random.Random(f"prompts-{context.seed}").shuffle(beginnings)
    document = {"settings": asdict(settings), "prompts": beginnings, "model": file_digests(model), "seed": context.seed}
    run = fingerprint(document | {"device": torch.device(context.device).type})
    corpus, saved = _resume(workdir, run, context), time.monotonic()
    wanted, unit = (settings.documents, "documents") if settings.documents is not None else (settings.tokens or 0, "tokens")
    while (done := getattr(corpus, unit)) < wanted:
        if corpus.batches >= PATIENCE and corpus.documents < LEAST_YIELD * corpus.sampled:
            context.warn(f"the model repeats itself: {done} {unit} of {wanted} were worth keeping of {corpus.sampled} documents sampled; "
                         "a higher temperature or top_p, or more prompt_tokens, gives more")  # fmt: skip
            break
        context.progress(done, wanted, f"{unit}, of {corpus.sampled} documents sampled")
        first = corpus.batches * settings.batch_size
        chosen = [beginnings[row % len(beginnings)] for row in range(first, first + settings.batch_size)]
        written = sample(
            network, torch.tensor([[start, *prompt] for prompt in chosen]), length=settings.length, temperature=settings.temperature,
            top_p=settings.top_p, ends=ends, vocabulary=len(tokenizer), seed=_seed(context.seed, corpus.batches),
        )  # fmt: skip
        corpus.batches += 1
        for prompt, tokens in zip(chosen, written, strict=True):
            if getattr(corpus, unit) < wanted:
                corpus.add(prompt, tokens, ends, tokenizer, settings.min_tokens)
        if time.monotonic() - saved >= save_seconds:
            write_checkpoint(workdir, corpus.batches, corpus.save, run=run)
            saved = time.monotonic()
    if not corpus.texts:
        raise UnusableModel(f"{model} wrote nothing worth keeping in {corpus.sampled} documents: all were blank or too short", key="model")
    out.mkdir(parents=True, exist_ok=True)
    corpus.save(out)
    return {name: float(count) for name, count in corpus.counts().items()}


@torch.inference_mode()
def sample(
    model: PreTrainedModel, prompts: torch.Tensor, *, length: int, temperature: float, top_p: float, ends: Sequence[int], vocabulary: int,
    seed: int,
) -> list[list[int]]:  # fmt: skip
    """What a model writes behind each prompt, token by token with a KV cache: up to and with an end token, or up to `length` in all.

    prompts     int64 [batch, any]
    vocabulary  tokens to draw from, the first ones: embeddings may be padded
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    tokens, last = prompts.to(model.device), torch.tensor(ends, device=model.device)
    cache = DynamicCache(config=model.config)
    written: list[list[int]] = [[] for _ in prompts]
    unfinished = list(range(len(prompts)))
    for _ in range(length - prompts.shape[1]):
        logits = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1, :vocabulary]
        tokens = torch.multinomial(nucleus(logits, temperature=temperature, top_p=top_p), 1, generator=generator)
        for row, token in zip(unfinished, tokens[:, 0].tolist(), strict=True):
            written[row].append(token)
        going = (~torch.isin(tokens[:, 0], last)).nonzero()[:, 0]
        if not len(going):
            break
        if len(going) < len(unfinished):  # rows that ended cost nothing any more
            cache.batch_select_indices(going)
            tokens, unfinished = tokens[going], [unfinished[row] for row in going.tolist()]
    return written


def nucleus(logits: torch.Tensor, *, temperature: float, top_p: float) -> torch.Tensor:
    """softmax(logits / temperature), cut to the fewest tokens that hold `top_p` of it (Holtzman et al., arXiv 1904.09751).

    Float32 probabilities [..., vocabulary] that sum to 1. The likeliest token always stays.
    """
    probabilities = (logits.float() / temperature).softmax(-1)
    if top_p == 1:
        return probabilities
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    likelier = ordered.cumsum(-1) - ordered  # mass of the tokens before this one
    kept = torch.zeros_like(ordered).scatter(-1, order, ordered.where(likelier < top_p, 0))
    return kept / kept.sum(-1, keepdim=True)


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """EOS of the tokenizer and of the generation settings, which may list several."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    several = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in (*several, tokenizer.eos_token_id) if token is not None})


@dataclass
class _Corpus:
    """What is kept so far, in order, and how it was come by."""

    texts: dict[str, None] = field(default_factory=dict)
    tokens: int = 0
    sampled: int = 0
    duplicates: int = 0
    too_short: int = 0
    cut: int = 0
    batches: int = 0

    @property
    def documents(self) -> int:
        return len(self.texts)

    def add(self, prompt: list[int], written: list[int], ends: Sequence[int], tokenizer: PreTrainedTokenizerBase, min_tokens: int) -> None:
        self.sampled += 1
        ended = written[-1] in ends
        body = written[:-1] if ended else written
        text = str(tokenizer.decode([*prompt, *body], skip_special_tokens=True, clean_up_tokenization_spaces=False))
        text = text if ended else text.rstrip("\ufffd")  # a character that `length` cut in two
        if len(body) < min_tokens or not text.strip():
            self.too_short += 1
        elif text in self.texts:
            self.duplicates += 1
        else:
            self.texts[text] = None
            self.tokens += len(prompt) + len(body)
            self.cut += not ended

    def counts(self) -> dict[str, int]:
        return {"documents": self.documents, **{name: count for name, count in asdict(self).items() if name not in ("texts", "batches")}}

    def save(self, folder: Path) -> None:
        with (folder / CORPUS).open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in self.texts)
        (folder / COUNTS).write_text(json.dumps(self.counts() | {"batches": self.batches}, indent=1) + "\n")


def _resume(workdir: Path, run: str, context: Context) -> _Corpus:
    """What an earlier process of the same work left behind, or nothing yet."""
    found = latest_checkpoint(workdir, run=run, warn=context.warn)
    if found is None:
        return _Corpus()
    counts = json.loads((found / COUNTS).read_text())
    with (found / CORPUS).open(encoding="utf-8") as stream:
        texts = {json.loads(line)["text"]: None for line in stream}
    return _Corpus(texts, **{name: count for name, count in counts.items() if name != "documents"})


def _seed(seed: int, batch: int) -> int:
    """63 bits, unlike for other batches and other seeds."""
    return random.Random(f"synthesize-{seed}-{batch}").getrandbits(63)
