"""GGUF's types: of whole files, of single tensors, and what they need. Imports neither torch nor gguf: planning uses it."""

FLOATS = ("f32", "f16", "bf16")
WRITTEN = (*FLOATS, "q8_0")  # the types of files that edgepress writes itself, tensor by tensor
CARRY = "carry"  # the checkpoint's own codes, as q4_0, q4_1 or q8_0

# Types that llama.cpp's own quantizer writes, with about the bits of a weight. It mixes types in a file: q4_k_m holds q6_k where that counts most.
QUANTIZED: dict[str, float] = {
    "q4_0": 4.5, "q4_1": 5.0, "q5_0": 5.5, "q5_1": 6.0,
    "q2_k_s": 2.7, "q2_k": 2.9, "q3_k_s": 3.4, "q3_k_m": 3.9, "q3_k_l": 4.2, "q4_k_s": 4.6, "q4_k_m": 4.9, "q5_k_s": 5.5, "q5_k_m": 5.7,
    "q6_k": 6.6, "iq4_nl": 4.5, "iq4_xs": 4.3, "iq3_m": 3.7, "iq3_s": 3.5, "iq3_xs": 3.3, "iq3_xxs": 3.1, "iq2_m": 2.7, "iq2_s": 2.5,
    "iq2_xs": 2.4, "iq2_xxs": 2.1, "iq1_m": 1.8, "iq1_s": 1.6,
}  # fmt: skip
TYPES = (*WRITTEN, CARRY, *QUANTIZED)
# llama.cpp refuses these without an importance matrix.
NEEDS_IMPORTANCE = ("q2_k_s", "iq3_xs", "iq3_xxs", "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s")

BLOCK, SUPERBLOCK = 32, 256  # weights that share their scales
NARROW = "f16"  # the type of rows that are not a multiple of a block, in llama.cpp's quantizer too
# Types of embedding and head, with the weights of a block. Types that need an importance matrix are left out: no embedding has one.
TENSOR_TYPES: dict[str, int] = {
    "f32": 1, "f16": 1, "bf16": 1, "q8_0": BLOCK, "q4_0": BLOCK, "q4_1": BLOCK, "q5_0": BLOCK, "q5_1": BLOCK, "iq4_nl": BLOCK,
    "q2_k": SUPERBLOCK, "q3_k": SUPERBLOCK, "q4_k": SUPERBLOCK, "q5_k": SUPERBLOCK, "q6_k": SUPERBLOCK, "iq4_xs": SUPERBLOCK, "iq3_s": SUPERBLOCK,
}  # fmt: skip
# The types that llama.cpp's quantizer mixes into files of blocks of 32. Into all others it mixes types of superblocks only.
_MIXED: dict[str, tuple[str, ...]] = {
    "q4_0": ("q4_0", "q4_1"), "q4_1": ("q4_1",), "q5_0": ("q5_0", "q5_1"), "q5_1": ("q5_1",), "iq4_nl": ("iq4_nl", "q5_k"),
}  # fmt: skip


def bits_per_weight(type: str) -> float:
    """Return about how many bits a weight of the linear layers takes in a file of this type."""
    return {"f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5, CARRY: 5}.get(type) or QUANTIZED[type]


def row_multiple(type: str) -> int:
    """Return what the rows of all linear layers should be a multiple of in a file of this type."""
    return SUPERBLOCK if type in QUANTIZED and type not in _MIXED else BLOCK


def row_type(type: str, width: int) -> str:
    """Return the type of a matrix with rows of `width` weights in a file of `type`, one of WRITTEN."""
    return NARROW if type == "q8_0" and width % BLOCK else type


def is_fallback(tensor_type: str, block: int, type: str) -> bool:
    """Whether a linear layer of a file of `type` has another type because of the width of its rows.

    block  the weights of a block of `tensor_type`
    """
    if type == CARRY:
        return tensor_type == NARROW
    if type not in QUANTIZED:
        return tensor_type != type
    return tensor_type not in _MIXED[type] if type in _MIXED else block != SUPERBLOCK
