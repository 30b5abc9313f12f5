"""What differs between decoder architectures, in one table. Imports no torch.

Names are module paths inside a decoder block, as transformers spells them. A family that is not listed here still
takes everything that only needs linear layers: round-to-nearest, GPTQ, fp8 and unstructured pruning.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Family:
    """One architecture.

    blocks        path of the list of decoder blocks in the causal model
    embed, norm, head   paths of the token embedding, the final norm and the output head
    qkv           query, key and value projections; or one layer whose rows are those of the three, in this order
    out           the output projection of attention
    gate_up, down the MLP's projections; gate_up may be one layer whose rows are those of gate, then those of up
    qk_norm       a norm of queries and keys: of each head's, with one weight [head_dim] for all ("head"), or of all heads together
                  with a weight for each of their channels ("full")
    norm_offset   the norms multiply by norm_offset + weight
    scale_pairs   (producer, consumers) through which a per-channel scale may move: a norm or a linear layer before linear
                  layers that read its output and nothing else
    """

    blocks: str = "model.layers"
    embed: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    out: str = "self_attn.o_proj"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    qk_norm: Literal["head", "full"] | None = None
    norm_offset: float = 0.0
    scale_pairs: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("self_attn.v_proj", ("self_attn.o_proj",)),
        ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ("mlp.up_proj", ("mlp.down_proj",)),
    )

    @property
    def linears(self) -> tuple[str, ...]:
        """Every linear layer of a block that is pruned or quantized."""
        return (*self.qkv, self.out, *self.gate_up, self.down)

    def parts(self, path: str) -> int:
        """How many projections a layer holds: 3 for a fused qkv, 2 for a fused gate and up, 1 for any other."""
        return {self.qkv: 3, self.gate_up: 2}.get((path,), 1)


_LLAMA = Family()
_AFTER_NORMS = _LLAMA.scale_pairs[1::2]  # v -> o and up -> down: the pairs that need no norm in front

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": Family(qk_norm="head"),
    "smollm3": _LLAMA,
    "olmo2": Family(qk_norm="full", scale_pairs=_AFTER_NORMS),  # its norms stand behind attention and MLP
    "gemma3_text": Family(
        qk_norm="head",
        norm_offset=1.0,
        scale_pairs=(
            ("input_layernorm", _LLAMA.qkv),
            ("pre_feedforward_layernorm", _LLAMA.gate_up),
            *_AFTER_NORMS,
        ),
    ),
    "phi3": Family(
        qkv=("self_attn.qkv_proj",),
        gate_up=("mlp.gate_up_proj",),
        scale_pairs=(
            ("input_layernorm", ("self_attn.qkv_proj",)),
            ("self_attn.qkv_proj", ("self_attn.o_proj",)),
            ("post_attention_layernorm", ("mlp.gate_up_proj",)),
            ("mlp.gate_up_proj", ("mlp.down_proj",)),
        ),
    ),
}
