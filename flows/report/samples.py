"""What each stage generates, side by side. Imports no torch."""

from collections.abc import Sequence

from markupsafe import Markup

from flows.report.rendering import Cell, render, render_table, word_cells
from flows.report.rows import Row, shown
from flows.report.table import figure_cell
from tasks.measurement.figures import SANITY

_NOTE = "Shares of the generated text: 4-grams of tokens that repeat an earlier one, texts that are empty, and texts with bytes that are not characters."


def samples_section(rows: Sequence[Row]) -> Markup:
    """Render for each prompt a card a stage; what a stage has in common with the base is dim. Empty where nothing was generated."""
    base_stage, listed = rows[0]["stage"], shown(rows)
    texts = {row["stage"]: {one["prompt"]: one["text"] for one in row["details"].get("samples", ())} for row in listed}
    parts = []
    for prompt in dict.fromkeys(prompt for by_prompt in texts.values() for prompt in by_prompt):
        base = texts.get(base_stage, {}).get(prompt)
        cards = [
            (_visible(stage), *_compared(by_prompt[prompt], base if stage != base_stage else None))
            for stage, by_prompt in texts.items()
            if prompt in by_prompt
        ]
        parts.append(render("samples", _visible(prompt), cards))
    return Markup().join([*parts, _sanity(listed)]) if parts else Markup()


def _sanity(rows: Sequence[Row]) -> Markup:
    """How often each stage repeats itself, generates nothing, or generates bytes that are not characters."""
    found = [row for row in rows if any(figure.metric in row["metrics"] for figure in SANITY)]
    heads = [*word_cells(["stage"]), *(Cell(figure.heading) for figure in SANITY)]
    lines = [[*word_cells([row["stage"]]), *(figure_cell(row["metrics"], figure) for figure in SANITY)] for row in found]
    return render_table(heads, lines) + render("note", _NOTE) if found else Markup()


def _visible(text: str) -> str:
    """The text with Unicode pictures for control characters, which a page must not hold."""
    return text.translate({code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"})


def _compared(text: str, base: str | None) -> tuple[str, str, str, str]:
    """What the text has in common with the base's, the rest, a remark, and the remark's class."""
    if not text:
        return "", "", "(empty)", "worse"
    text, base = _visible(text), base if base is None else _visible(base)
    if base is None:
        return "", text, "", ""
    if text == base:
        return text, "", "\n(as the base)", "dim"
    common = next((n for n, (ours, theirs) in enumerate(zip(text, base, strict=False)) if ours != theirs), min(len(text), len(base)))
    return text[:common], text[common:], "", ""
