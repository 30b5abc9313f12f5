"""Methods of fine-tuning, and what each needs. Imports no torch: recipes are validated with it."""

import re
from importlib.util import find_spec
from typing import Annotated, Literal

from pydantic import Field

from compression.checkpoints.checkpoint import Checkpoint
from compression.checkpoints.families import FAMILIES
from compression.errors import Incompatible, MissingExtra
from compression.training import TrainingSettings

FinetuningMethod = Literal["full", "lora", "dora", "qlora"]
TIED = (
    "target_modules names {}, and the embedding and the output head of this model are one matrix (tie_word_embeddings): an adapter acts at "
    "one end, and merged it would act at both; leave it out, or take method: full"
)


class FinetuningSettings(TrainingSettings):
    """Fine-tuning on next tokens: training (`TrainingSettings`) of all weights, or of adapters that are merged afterwards.

    In a recipe:

        tuned:
          uses: finetune
          method: lora
          rank: 16
          steps: 200

    The methods:
        full: Every weight.
        lora: W + (alpha / rank)·B·A (Hu et al., "LoRA", arXiv 2106.09685).
        dora: m · (W + (alpha / rank)·B·A) / ‖W + (alpha / rank)·B·A‖, by rows (Liu et al., arXiv 2402.09353).
        qlora: lora over a base in 4-bit NF4 (Dettmers et al., arXiv 2305.14314); merged into the float32 weights.

    Lifecycle: adapters are put on `target_modules`, trained as `TrainingSettings` says, kept as peft opens them, and merged into the
    float32 weights.
    """

    method: Annotated[
        FinetuningMethod,
        Field(
            description="`lora` trains low-rank adapters, `dora` their rows' norms too, `qlora` adapters over a 4-bit base, `full` every weight."
        ),
    ] = "lora"
    rank: Annotated[int, Field(ge=1, description="Rank of the adapters.")] = 16
    rank_pattern: Annotated[
        dict[str, int], Field(default_factory=dict, description="Other ranks, by name or pattern of the layer: {mlp.down_proj: 32}.")
    ]
    alpha: Annotated[int, Field(ge=1, description="The adapters' update is scaled by alpha / rank.")] = 32
    dropout: Annotated[float, Field(ge=0, lt=1, description="Dropout before the adapters.")] = 0.0
    target_modules: Annotated[str | list[str], Field(description="`all-linear`, a pattern of paths, or names of layers.")] = "all-linear"


def check_method(checkpoint: Checkpoint, method: FinetuningMethod, target_modules: str | list[str] = "all-linear") -> None:
    """Refuse a method that does not fit the checkpoint or this environment.

    Raises:
        Incompatible: dora of a sparse checkpoint, adapters on a tied embedding or head.
        MissingExtra: qlora without bitsandbytes.
    """
    if method != "full" and checkpoint.tied and (tied := _ends(checkpoint, target_modules)):
        raise Incompatible(TIED.format(tied[0]), key="target_modules")
    if method == "dora" and checkpoint.sparse:
        raise Incompatible(
            "dora scales the rows of W + B·A to a learned norm, and that of a row whose update is masked is another; "
            "a sparse checkpoint takes method: lora, qlora or full",
            key="method",
        )
    if method == "qlora" and find_spec("bitsandbytes") is None:
        raise MissingExtra("bitsandbytes", "qlora", "fine-tuning with method: qlora, which holds the base in 4 bits,")


def _ends(checkpoint: Checkpoint, target_modules: str | list[str]) -> list[str]:
    """Paths of the embedding and the output head that `target_modules` names, as peft matches them; "all-linear" leaves both out."""
    if target_modules == "all-linear":
        return []
    if checkpoint.model_type in FAMILIES:
        paths = [checkpoint.family.embed, checkpoint.family.head]
    else:  # what has a row for each token; a tied head has no tensor of its own
        tables = [name for name, info in checkpoint.tensors.items() if len(info.shape) == 2 and info.shape[0] == checkpoint.vocab_size]
        paths = [*(name.removesuffix(".weight") for name in tables), "lm_head"]
    if isinstance(target_modules, str):
        return [path for path in paths if re.fullmatch(target_modules, path)]
    return [path for path in paths if any(path == name or path.endswith(f".{name}") for name in target_modules)]
