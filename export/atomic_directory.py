"""A directory that an exporter writes completely or not at all."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_directory(out: Path) -> Iterator[Path]:
    """Yield a temporary directory next to `out` whose files move into `out` when the block ends; after a failure nothing remains."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        yield Path(temporary)
        out.mkdir(exist_ok=True)
        for file in sorted(Path(temporary).iterdir()):
            file.replace(out / file.name)


def export_figures(out: Path, started: float) -> dict[str, float]:
    """Return the bytes of all files in `out`, and the seconds since `started` (`time.perf_counter`)."""
    return {"bytes": sum(f.stat().st_size for f in out.rglob("*") if f.is_file()), "seconds": time.perf_counter() - started}
