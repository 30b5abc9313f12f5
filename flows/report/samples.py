"""What each stage generates, side by side. Imports no torch."""

from collections.abc import Sequence
from html import escape as escape_markup

from flows.report.rows import Row, shown
from flows.report.table import cell
from tasks.measurement.figures import SANITY


def samples_section(rows: Sequence[Row]) -> str:
    """For each prompt a card a stage; what a stage has in common with the base is dim. Empty where nothing was generated."""
    texts = {row["stage"]: {one["prompt"]: one["text"] for one in row["details"].get("samples", ())} for row in shown(rows)}
    base = texts.get(rows[0]["stage"], {})
    parts = []
    for prompt in dict.fromkeys(prompt for by_prompt in texts.values() for prompt in by_prompt):
        cards = "".join(
            f"<div><b>{escape(stage)}</b>\n{_compared(by_prompt[prompt], base.get(prompt) if stage != rows[0]['stage'] else None)}</div>"
            for stage, by_prompt in texts.items()
            if prompt in by_prompt
        )
        parts.append(f'<h3>“{escape(prompt)}”</h3><div class="samples">{cards}</div>')
    return "".join(parts) + (_sanity(shown(rows)) if parts else "")


def _sanity(rows: Sequence[Row]) -> str:
    """How often each stage repeats itself, says nothing, or says what are no characters."""
    told = [row for row in rows if any(figure.metric in row["metrics"] for figure in SANITY)]
    heads = "".join(f"<th>{escape(figure.heading)}</th>" for figure in SANITY)
    lines = "".join(
        f'<tr><td class="words">{escape(row["stage"])}</td>{"".join(cell(row["metrics"], figure) for figure in SANITY)}</tr>'
        for row in told
    )
    table = f'<div class="scroll"><table><thead><tr><th class="words">stage</th>{heads}</tr></thead><tbody>{lines}</tbody></table></div>'
    note = "Shares of what was generated: of 4-grams of tokens those that were there before, of texts those that are empty or hold bytes that are no characters."
    return f'{table}<p class="dim">{note}</p>' if told else ""


def escape(text: str) -> str:
    """Text for the page. A model may say control characters, which no page may hold: their Unicode pictures stand for them."""
    return escape_markup(text.translate({code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}))


def _compared(text: str, base: str | None) -> str:
    if not text:
        return '<span class="worse">(empty)</span>'
    if base is None:
        return escape(text)
    if text == base:
        return f'<span class="dim">{escape(text)}\n(as the base)</span>'
    alike = next((n for n, (mine, its) in enumerate(zip(text, base, strict=False)) if mine != its), min(len(text), len(base)))
    return f'<span class="dim">{escape(text[:alike])}</span>{escape(text[alike:])}'
