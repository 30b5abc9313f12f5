"""`edgepress sensitivity`: which layers of a recipe's model need more bits, as a table and as the `layers:` of quantize.gptq."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from compression.checkpoints.checkpoint import Checkpoint
from compression.context import Context
from compression.data import check_data
from compression.errors import Incompatible
from flows.planning import Recipe
from flows.report.layers import render_sensitivity
from tasks.stage import check_accepts

if TYPE_CHECKING:
    from compression.quantization.sensitivity import Sensitivity


def show_sensitivity(
    recipe: Recipe,
    model: Checkpoint,
    *,
    average_bits: float,
    group_size: int,
    symmetric: bool,
    console: Console,
) -> str:
    """Measure every layer of the base model on the recipe's calibration data, and print errors and a distribution of bits.

    Args:
        recipe: Gives data, seed and threads.
        model: The dense base model.
        average_bits: Bits of a weight to distribute, from 2 to 8.
        group_size: Input channels that share a scale; -1 for a row.
        symmetric: Round without zero points.
        console: Where to print.

    Returns:
        The same as an HTML page.

    Raises:
        Incompatible: The bits, the model or its widths do not allow it.
        UnusableData: The calibration data are missing or too short.
    """
    from tasks.kinds.quantize_gptq import QuantizeGptq

    if not 2 <= average_bits <= 8:
        raise Incompatible(f"an average of {average_bits} bits is impossible: layers get 2, 3, 4 or 8", key="bits")
    stage = QuantizeGptq(group_size=group_size, symmetric=symmetric)
    stage.plan(check_accepts(stage, model), {}, recipe.data)
    check_data(recipe.data)

    import torch

    from compression.checkpoints.loading import load_tokenizer
    from compression.data import calibration_windows
    from compression.quantization.sensitivity import allocate_bits, measure_sensitivity

    torch.set_num_threads(recipe.threads)
    windows = calibration_windows(recipe.data, load_tokenizer(model.path), recipe.seed)
    columns = (TextColumn("sensitivity"), BarColumn(bar_width=24), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        line = bars.add_task("starting", total=None)

        def progress(done: int, total: int, what: str) -> None:
            bars.update(line, completed=done, total=total, description=what)

        layers = measure_sensitivity(model.path, windows, group_size=group_size, symmetric=symmetric, context=Context(progress=progress))
    chosen = allocate_bits(layers, average_bits)
    console.print(_table(layers, chosen))
    console.print("For quantize.gptq or quantize.rtn (export.gguf carries 4 and 8 bits):", markup=False)
    console.print(
        yaml.safe_dump({"layers": {path: {"bits": bits} for path, bits in chosen.items()}}, sort_keys=False, default_flow_style=None),
        markup=False,
        highlight=False,
        end="",
    )
    errors = {path: {f"{bits} bits": error for bits, error in layer.errors.items()} for path, layer in layers.items()}
    return render_sensitivity(f"{recipe.name}: sensitivity of layers", errors, chosen)


def _table(layers: Mapping[str, "Sensitivity"], chosen: Mapping[str, int]) -> Table:
    """A row for each layer, the most sensitive first: its error by bits, and the bits it gets."""
    widths = sorted(next(iter(layers.values())).errors)
    table = Table(title="relative error of a layer's output, rounded to nearest", title_justify="left")
    table.add_column("layer")
    for heading in ("weights", *(f"{bits} bits" for bits in widths), "bits chosen"):
        table.add_column(heading, justify="right")
    for path, layer in sorted(layers.items(), key=lambda item: -item[1].errors[widths[-2]]):
        table.add_row(path, f"{layer.weights:,}", *(f"{layer.errors[bits]:.2g}" for bits in widths), str(chosen[path]))
    return table
