"""What the weight-only methods share: they round layers that read the same input together, and collect the rounded layers of a block."""

from collections.abc import Callable, Iterator, Mapping

import torch

from compression.calibration.calibration import CompressedBlock
from compression.calibration.second_order import output_power
from compression.calibration.walk import Block
from compression.checkpoints.layouts import QuantizedLinear, gptq_tensors
from compression.checkpoints.quantization_config import WeightScheme
from compression.quantization.grid import Grid


def group_by_scheme(
    block: Block, layers: tuple[str, ...], planned: Mapping[str, WeightScheme | None]
) -> Iterator[tuple[tuple[str, ...], WeightScheme]]:
    """Group layers that share an input by their scheme; leave out those that stay as they are."""
    groups: dict[WeightScheme, list[str]] = {}
    for path in layers:
        scheme = planned.get(f"{block.name}.{path}")
        if scheme is not None:
            groups.setdefault(scheme, []).append(path)
    yield from ((tuple(paths), scheme) for scheme, paths in groups.items())


def quantized_linear(codes: torch.Tensor, grid: Grid, rows: slice = slice(None)) -> QuantizedLinear:
    """Return codes on a grid as they will be stored; `rows` selects one layer where several were stacked."""
    return QuantizedLinear(codes[rows], grid.scales[rows].half(), grid.zeros[rows].to(torch.uint8), grid.bits, grid.group_size)


class RoundedLayers:
    """Collect the layers of a block as they are rounded, and put the rounded weights in place."""

    def __init__(self, block: Block, layout: Callable[[QuantizedLinear], dict[str, torch.Tensor]] = gptq_tensors):
        self._block, self._layout = block, layout
        self._tensors: dict[str, torch.Tensor] = {}
        self._report: dict[str, dict[str, float]] = {}
        self._fallbacks: list[tuple[tuple[str, ...], str]] = []

    def add(self, paths: tuple[str, ...], weight: torch.Tensor, codes: torch.Tensor, grid: Grid, hessian: torch.Tensor) -> None:
        """Add the codes [out, in] of layers whose stacked weights [out, in] read inputs with the mean `hessian` of x xᵀ."""
        start = 0
        for path in paths:
            layer = self._block.linear(path)
            rows = slice(start, start + layer.out_features)
            start = rows.stop
            rounded = quantized_linear(codes, grid, rows)
            layer.weight.copy_(rounded.dequantize())
            power = output_power(weight[rows], hessian).sum()
            error = output_power(layer.weight.float() - weight[rows], hessian).sum()
            self._report[path] = {
                "relative_error": float(error / power) if power > 0 else 0.0,
                "bits": rounded.bits, "group_size": rounded.group_size, "weights": layer.weight.numel(),
            }  # fmt: skip
            self._tensors |= {f"{path}.{suffix}": tensor for suffix, tensor in self._layout(rounded).items()}

    def fall_back(self, paths: tuple[str, ...], reason: str) -> None:
        """Count layers that the method could not treat like the others."""
        self._fallbacks.append((paths, reason))

    def outcome(self) -> CompressedBlock:
        """Return the compressed block."""
        counts = {"fallback_layers": float(len({path for paths, _ in self._fallbacks for path in paths}))}
        warnings = [f"{', '.join(f'{self._block.name}.{path}' for path in paths)}: {reason}" for paths, reason in self._fallbacks]
        return CompressedBlock(self._tensors, counts=counts, layers=self._report, warnings=warnings)
