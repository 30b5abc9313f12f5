"""A directory that an exporter writes whole or not at all."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(out: Path) -> Iterator[Path]:
    """Give a place to write files into, beside `out`; they go into `out` when the block ends well, and nothing does when it fails."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as place:
        yield Path(place)
        out.mkdir(exist_ok=True)
        for file in sorted(Path(place).iterdir()):
            file.replace(out / file.name)
