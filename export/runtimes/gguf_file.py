"""Which GGUF file a path means. Imports no runtime."""

from pathlib import Path

from compression.errors import UnusableModel


def gguf_file(path: Path) -> Path:
    """The GGUF file that a path means: itself, or the only one in a directory. Raises UnusableModel for none or several."""
    if path.is_file():
        return path
    found = sorted(path.glob("*.gguf"))
    if len(found) != 1:
        raise UnusableModel(f"{path} holds {len(found)} GGUF files; name one of them: {', '.join(f.name for f in found)}", key="model")
    return found[0]
