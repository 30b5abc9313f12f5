"""Continue the beginnings of evaluation windows: samples for people, and how sane they are."""

from typing import TYPE_CHECKING

from compression.context import Context
from compression.evaluation.findings import Findings
from compression.evaluation.sanity import means, sanity
from compression.evaluation.writing import Writer

if TYPE_CHECKING:
    from torch import Tensor

PROMPT_TOKENS = 32


def generate_samples(writer: Writer, windows: "Tensor", *, count: int, shown: int, context: Context) -> Findings:
    """Continue the first tokens of windows: 32, or half a window if that is less.

    Args:
        writer: Generates.
        windows: int64 [windows, length].
        count: How many windows to continue, at most.
        shown: How many texts to keep, the first ones.
        context: Hears of progress.

    Returns:
        repetition_rate, empty_rate, invalid_utf8_rate and generations_count; in `details` samples: a list of {prompt, text}.
    """
    beginnings = [row[: min(PROMPT_TOKENS, len(row) // 2)] for row in windows[:count].tolist()]
    written = []
    for beginning in beginnings:
        written.append(writer.continue_from(beginning))
        context.progress(len(written), len(beginnings), "samples")
    items = sanity(written)
    samples = [
        {"prompt": writer.text.decode(beginning), "text": w.text} for beginning, w in zip(beginnings[:shown], written[:shown], strict=True)
    ]
    return Findings(means(items) | {"generations_count": float(len(written))}, items, {"samples": samples})
