"""Walk over a model block by block with calibration data, and let a method compress each block."""
