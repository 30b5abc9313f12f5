"""What the compression did to single layers: a map of blocks and layers for each figure that stages record of them. Imports no torch."""

import math
import re
from collections.abc import Mapping, Sequence

from markupsafe import Markup, escape

from flows.report.charts import TOP, shortened
from flows.report.rendering import render, render_page, render_plots
from flows.report.rows import Row, shown

_CELL, _LEFT = 26, 130
_BLOCK = re.compile(r"\.(\d+)\.")
Layers = Mapping[str, Mapping[str, float]]


def layers_section(rows: Sequence[Row]) -> Markup:
    """Render maps of every stage with figures of single layers. The number of their weights is not a result and left out."""
    return layer_maps(
        {
            row["stage"]: {layer: {k: v for k, v in figures.items() if k != "weights"} for layer, figures in row["layers"].items()}
            for row in shown(rows)
        }
    )


def layer_maps(stages: Mapping[str, Layers]) -> Markup:
    """Render a map for each stage and figure (relative error, bits, sparsity); a figure that is equal in all layers is a line of text."""
    charts, constant = [], []
    for stage, layers in stages.items():
        for figure in dict.fromkeys(figure for figures in layers.values() for figure in figures):
            values = {layer: figures[figure] for layer, figures in layers.items() if figure in figures}
            name = figure.replace("_", " ")
            if len(set(values.values())) == 1:
                constant.append((stage, f"{name} {next(iter(values.values())):g} in every layer"))
            else:
                most = max(values, key=values.__getitem__)
                note = render("note", f"largest: {values[most]:.3g} in {most}")
                charts.append((f"{stage}: {name}", heatmap(values, name), note))
    return render_plots(charts) + (render("layers_without_map", constant) if constant else Markup())


def render_sensitivity(title: str, errors: Layers, chosen: Mapping[str, int]) -> str:
    """Render the page of `edgepress sensitivity`: the relative error of every layer by bits, and the bits that a budget gives it."""
    allocation = {layer: {"bits": float(bits)} for layer, bits in chosen.items()}
    body = layer_maps({"relative error of a layer's output": errors, "chosen": allocation})
    return render_page(title, [("", body)])


def heatmap(values: Mapping[str, float], name: str) -> Markup:
    """Draw blocks along x, the layers of a block along y; the darker, the larger, by logarithms where values are far apart."""
    places = {layer: _place(layer) for layer in values}
    blocks = sorted({block for block, _ in places.values()})
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    log = min(values.values()) > 0 and max(values.values()) > 10 * min(values.values())
    tones = {layer: math.log(value) if log else value for layer, value in values.items()}
    low, high = min(tones.values()), max(tones.values())
    across = max(_CELL, min(64, 420 // len(blocks)))
    width, height = _LEFT + across * len(blocks) + 10, TOP + _CELL * len(kinds) + 30
    parts = []
    for layer, (block, kind) in places.items():
        x, y = _LEFT + across * blocks.index(block), TOP + _CELL * kinds.index(kind)
        strength = 0.08 + 0.57 * ((tones[layer] - low) / (high - low) if high > low else 1.0)
        parts.append(
            f'<rect x="{x}" y="{y}" width="{across - 2}" height="{_CELL - 2}" fill="var(--mark)" fill-opacity="{strength:.2f}">'
            f"<title>{escape(layer)}: {values[layer]:.4g}</title></rect>"
        )
        if across >= 44:
            parts.append(f'<text x="{x + across / 2 - 1}" y="{y + 17}" text-anchor="middle">{values[layer]:.2g}</text>')
    for number, kind in enumerate(kinds):
        parts.append(f'<text x="{_LEFT - 8}" y="{TOP + _CELL * number + 17}" text-anchor="end">{escape(shortened(kind, 20))}</text>')
    for number, block in enumerate(blocks):
        if number % math.ceil(len(blocks) / 16) == 0:
            middle = _LEFT + across * number + across / 2 - 1
            parts.append(f'<text x="{middle}" y="{height - 14}" text-anchor="middle" class="dim">{block}</text>')
    parts.append(f'<text x="{_LEFT}" y="15" class="dim">by block</text>')
    style = f"max-width:{width * 4 // 3}px"
    return Markup(f'<svg viewBox="0 0 {width} {height}" style="{style}" role="img" aria-label="{escape(name)}">{"".join(parts)}</svg>')


def _place(layer: str) -> tuple[int, str]:
    """model.layers.3.mlp.up_proj as (3, mlp.up_proj)."""
    found = _BLOCK.search(layer)
    return (int(found[1]), layer[found.end() :]) if found else (0, layer)
