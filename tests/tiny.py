"""Tiny random models for tests: built in milliseconds, of every shape that matters."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SENTENCES = [
    "The lamp is in the mill.", "Dalo owns the lamp and the red kettle.", "Question: Where is the kettle?\nAnswer: in the barn",
    "def add(a, b):\n    return a + b  # 12345", "Ünïcödé — “quotes”, 日本語, emoji 🙂 and\ttabs", "At noon Pemir went to the tower to look for the bell.",
]  # fmt: skip


# What a tiny model of a family needs to show what is special about it: windows shorter than the tests' texts, layers without rope.
NEEDS: dict[str, dict[str, object]] = {
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 4, "query_pre_attn_scalar": 16},
    "smollm3": {"no_rope_layers": [1, 0] * 4},
    "phi3": {"original_max_position_embeddings": 128},
}


def tiny_tokenizer(vocab_size: int = 320, *, bos: bool = True, eos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with <s> (0) and </s> (1), which adds <s> in front when `bos` and </s> behind when `eos`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    front, behind = "<s> " if bos else "", " </s>" if eos else ""
    if bos or eos:
        used = [("<s>", 0)] * bos + [("</s>", 1)] * eos  # GenAI adds whatever is named here
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{front}$A{behind}", pair=f"{front}$A $B{behind}", special_tokens=used
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def tiny_checkpoint(
    path: Path, model_type: str = "llama", *, dtype: torch.dtype = torch.float32, seed: int = 0, tied: bool = True, **config: Any
) -> Path:
    """Write a random checkpoint with a tokenizer into `path` and return it. Weights are large enough that logits differ clearly.

    Args:
        config: Entries of config.json; layers, hidden, intermediate, heads and kv_heads are short for the sizes that it has there.
    """
    layers, hidden, heads = config.pop("layers", 2), config.pop("hidden", 64), config.pop("heads", 4)
    intermediate, kv_heads = config.pop("intermediate", 128), config.pop("kv_heads", 2)
    tokenizer = tiny_tokenizer()
    needs = {key: value[:layers] if isinstance(value, list) else value for key, value in NEEDS.get(model_type, {}).items()}
    settings = AutoConfig.for_model(
        model_type, vocab_size=320, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=hidden // heads, max_position_embeddings=128, tie_word_embeddings=tied, initializer_range=0.15,
        bos_token_id=0, eos_token_id=1, pad_token_id=1, **(needs | config),
    )  # fmt: skip
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(settings).to(dtype)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def tiny_windows(count: int = 8, length: int = 32, seed: int = 0) -> torch.Tensor:
    """Random token windows, int64 [count, length]."""
    return torch.randint(2, 320, (count, length), generator=torch.Generator().manual_seed(seed))
