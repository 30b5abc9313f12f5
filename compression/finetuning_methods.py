"""How a model can be fine-tuned, and what each way asks for. Imports no torch: recipes are validated with it."""

from importlib.util import find_spec
from typing import Literal

from compression.checkpoint import Checkpoint
from compression.errors import Incompatible, MissingExtra

Method = Literal["full", "lora", "dora", "qlora"]


def check_method(checkpoint: Checkpoint, method: Method) -> None:
    """Raises Incompatible (dora of a sparse checkpoint), MissingExtra (qlora without bitsandbytes)."""
    if method == "dora" and checkpoint.sparse:
        raise Incompatible(
            "dora scales the rows of W + B·A to a learned norm, and that of a row whose update is masked is another; "
            "a sparse checkpoint takes method: lora, qlora or full",
            key="method",
        )
    if method == "qlora" and find_spec("bitsandbytes") is None:
        raise MissingExtra("bitsandbytes", "qlora", "fine-tuning with method: qlora, which holds the base in 4 bits,")
