"""Walk over a model block by block with calibration data, and let a method compress each block. Importing the package imports no torch."""

from typing import TYPE_CHECKING

from compression.lazy import lazy_names

if TYPE_CHECKING:
    from compression.calibration.calibration import BlockMethod, CompressedBlock, compress_blocks
    from compression.calibration.walk import Block, Walk

__all__ = ["Block", "BlockMethod", "CompressedBlock", "Walk", "compress_blocks"]
__getattr__ = lazy_names(
    __name__,
    Block="compression.calibration.walk",
    BlockMethod="compression.calibration.calibration",
    CompressedBlock="compression.calibration.calibration",
    Walk="compression.calibration.walk",
    compress_blocks="compression.calibration.calibration",
)
