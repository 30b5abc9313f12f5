"""What differs between decoder architectures, in one table. Imports no torch.

Names are module paths inside a decoder block, as transformers spells them. A family that is not listed here still
takes everything that only needs linear layers (GPTQ, RTN, unstructured pruning).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """One architecture.

    blocks        path of the list of decoder blocks in the causal model
    norm, head, embed   paths of the final norm, the output head and the token embedding
    attention     q, k, v and o projections of a block
    mlp           (gate, up, down) of a block
    scale_pairs   (producer, consumers) through which AWQ may move a per-channel scale: a norm or a linear layer before
                  linear layers that read its output and nothing else
    """

    blocks: str = "model.layers"
    embed: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"
    attention: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    mlp: tuple[str, str, str] = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    scale_pairs: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("self_attn.v_proj", ("self_attn.o_proj",)),
        ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ("mlp.up_proj", ("mlp.down_proj",)),
    )

    @property
    def linears(self) -> tuple[str, ...]:
        """Every linear layer of a block that is pruned or quantized."""
        return (*self.attention, *self.mlp)


FAMILIES: dict[str, Family] = {"llama": Family(), "mistral": Family(), "qwen2": Family(), "qwen3": Family()}
