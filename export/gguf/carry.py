"""GPTQ's and AWQ's codes as GGUF blocks, nothing rounded but the scales to fp16. Plain functions on arrays.

A block is 32 weights of a row that share fp16 numbers (ggml-common.h): q4_0 is d, 16 bytes of codes, w = d (q - 8); q4_1 is d, m, 16
bytes, w = d q + m; q8_0 is d, 32 signed bytes, w = d q. A byte of 4-bit codes holds code i in its low and code i + 16 in its high half.
A group of the checkpoint that spans several blocks gives each of them its scale.
"""

from collections.abc import Callable

import numpy as np

from compression.errors import Incompatible
from export.gguf.types import BLOCK


def pack(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, bits: int) -> tuple[str, np.ndarray]:
    """(GGUF type, uint8 [out, bytes]) of one linear layer: q4_0 where every zero is 8, q4_1 for other 4-bit codes, q8_0 for 8 bits.

    codes  uint8 [out, in]      scales  float [out, groups]      zeros  uint8 [out, groups];   w = scale (code - zero)
    Raises Incompatible: 8-bit codes with a zero other than 128, a scale that fp16 cannot hold.
    """
    if bits == 4:
        return ("q4_0", pack_q4_0(codes, scales)) if (zeros == 8).all() else ("q4_1", pack_q4_1(codes, scales, zeros))
    if bits != 8 or (zeros != 128).any():
        raise Incompatible(
            f"asymmetric codes of {bits} bits cannot be carried into GGUF; carried are 4 bits, and 8 bits with symmetric: true", key="type"
        )
    return "q8_0", pack_q8_0(codes, scales)


def pack_q4_0(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """4-bit codes around zero 8 -> uint8 [out, in / 32 * 18]."""
    return _blocks(codes, [scales], _nibbles)


def pack_q4_1(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> np.ndarray:
    """4-bit codes with their zeros -> uint8 [out, in / 32 * 20]; m = -d z, d being the rounded scale."""
    rounded = _half(scales).astype(np.float32)
    return _blocks(codes, [scales, -rounded * zeros], _nibbles)


def pack_q8_0(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """8-bit codes around zero 128 -> uint8 [out, in / 32 * 34]."""
    return _blocks(codes, [scales], lambda block: block ^ np.uint8(128))  # code - 128 in two's complement


def _nibbles(block: np.ndarray) -> np.ndarray:
    return block[..., : BLOCK // 2] | (block[..., BLOCK // 2 :] << 4)


def _blocks(codes: np.ndarray, numbers: list[np.ndarray], encode: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    out, width = codes.shape
    groups = numbers[0].shape[1]
    if width % groups or (width // groups) % BLOCK:
        raise Incompatible(f"{groups} groups in rows of {width} are no multiple of {BLOCK} weights each, GGUF's block", key="type")
    per_group = width // groups // BLOCK
    headers = [np.repeat(_half(n), per_group, axis=1)[..., None].view(np.uint8) for n in numbers]
    return np.concatenate([*headers, encode(codes.reshape(out, -1, BLOCK))], axis=-1).reshape(out, -1)


def _half(numbers: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        half = numbers.astype(np.float16)
    if not np.isfinite(half).all():
        raise Incompatible(f"a scale of {np.abs(numbers).max():g} is more than the fp16 of GGUF's blocks can hold (65504)", key="type")
    return half
