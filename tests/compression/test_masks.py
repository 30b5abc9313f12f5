"""Masks survive the file they are kept in, bit for bit as it is specified."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from compression.checkpoints.masks import MASKS, MaskWriter, pack_mask, read_masks, unpack_mask, write_masks
from compression.errors import UnusableModel


@st.composite
def masks(draw: st.DrawFn) -> torch.Tensor:
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 40))
    return torch.tensor(draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns))).view(rows, columns)


@given(masks())
def test_a_packed_mask_comes_back_and_each_bit_stands_where_it_should(mask: torch.Tensor) -> None:
    packed = pack_mask(mask)
    rows, columns = mask.shape
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, -(-columns // 8))
    assert torch.equal(unpack_mask(packed, columns), mask)
    for row in range(rows):
        bits = sum(int(byte) << (8 * index) for index, byte in enumerate(packed[row]))
        assert bits == sum(1 << column for column in range(columns) if mask[row, column])


def test_masks_are_read_by_name_and_written_the_same_every_time(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    kept = {f"model.layers.{index}.mlp.up_proj.weight": torch.rand(4, 9 + index, generator=generator) > 0.5 for index in range(12)}
    for name, order in (("a", list(kept)), ("b", list(reversed(kept)))):
        (tmp_path / name).mkdir()
        writer = MaskWriter(tmp_path / name)
        for weight in order:
            writer.add({weight: kept[weight]})
        writer.finish()
    assert (tmp_path / "a" / MASKS).read_bytes() == (tmp_path / "b" / MASKS).read_bytes()
    back = read_masks(tmp_path / "a")
    assert back.keys() == kept.keys()
    assert all(torch.equal(back[name], kept[name]) for name in kept)
    assert list(read_masks(tmp_path / "a", prefix="model.layers.1.")) == ["model.layers.1.mlp.up_proj.weight"]
    assert sum(tensor.nbytes for tensor in load_file(tmp_path / "a" / MASKS).values()) == sum(4 * -(-(9 + i) // 8) for i in range(12))


def test_no_masks_and_masks_of_others(tmp_path: Path) -> None:
    assert read_masks(tmp_path) == {}
    write_masks(tmp_path, {})
    assert not (tmp_path / MASKS).exists()
    save_file({"w": torch.zeros(2, 1, dtype=torch.uint8)}, tmp_path / MASKS)
    with pytest.raises(UnusableModel, match="no masks of edgepress"):
        read_masks(tmp_path)
