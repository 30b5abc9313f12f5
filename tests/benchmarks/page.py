"""docs/benchmarks.md: parts between markers, each rewritten by the command that measures it."""

from collections.abc import Sequence
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"


def rewrite(part: str, body: str) -> None:
    """Put `body` into its part of the page on disk."""
    PAGE.write_text(replaced(PAGE.read_text(), part, body))


def replaced(page: str, part: str, body: str) -> str:
    """The page with `body` between the markers of `part`. Raises ValueError for a page without them."""
    begin, end = f"<!-- begin {part} -->\n", f"<!-- end {part} -->\n"
    before, _, rest = page.partition(begin)
    _, marker, after = rest.partition(end)
    if not marker:
        raise ValueError(f"the page lacks the lines {begin.strip()!r} and {end.strip()!r}")
    return f"{before}{begin}\n{body.strip()}\n\n{end}{after}"


def markdown(headings: Sequence[str], aligned: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; `aligned` has "---" for a column of text and "---:" for one of numbers."""
    return "".join(f"| {' | '.join(line)} |\n" for line in [headings, aligned, *rows])
