"""What a stage is: its parameters as a frozen pydantic model, a check that needs no torch, and `run`. Imports no torch.

A kind of stage is one file with one subclass of `Stage`: in tasks/kinds, or in any installed package that names it under the entry-point
group `edgepress.stages`. Nothing else has to be edited; recipes, schema, planning, caching and measuring find it.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import ClassVar, Literal

from compression.checkpoints.checkpoint import Checkpoint, Layout
from compression.context import Context
from compression.data import DataSpec
from compression.data.fill import check_calibration
from compression.errors import Incompatible
from compression.origin import Origin
from compression.settings import Settings
from export.proof import Change

Reads = Literal["nothing", "calibration", "validation", "training"]


@dataclass(frozen=True)
class Artifact:
    """A planned or finished export: what no model stage can take any further."""

    runtime: str  # the runtime that opens it: "onnxruntime", "onnxruntime-genai", "openvino", "executorch", "llama.cpp"
    change: Change  # what the exporter does to the weights: the key of the default bounds of its proof
    size_bytes: int  # estimated while planned

    @property
    def words(self) -> str:
        return f"an export, and a {self.runtime} artifact is final"


@dataclass(frozen=True)
class Corpus:
    """Planned or written text (`corpus.jsonl`): what training stages read through their parameter `corpus`, and nothing else takes."""

    size_bytes: int  # estimated while planned

    @property
    def words(self) -> str:
        return "a corpus, which is text and no model; `corpus` of a training stage names it"


Planned = Checkpoint | Artifact | Corpus


@dataclass(frozen=True)
class Inputs:
    """Directories a stage reads: the checkpoint before it, and those it declared in `other_inputs` and `outside_inputs`, by role.

    origin  what everything was made of, told to exports, which may write it into their files
    """

    parent: Path
    others: Mapping[str, Path]
    origin: Origin | None = None


@dataclass(frozen=True)
class Workplace:
    """Directories a stage writes.

    out     becomes the stage's content in the store when `run` returns; empty at the start
    work    kept until then, also over a crash: training checkpoints, a walk's progress
    shared  what several stages of this store would compute alike (a teacher's outputs); None: keep it in `work`
    """

    out: Path
    work: Path
    shared: Path | None = None


class Stage(Settings):
    """Base of every stage kind. Fields are its parameters and part of its identity; so are `version` and `libraries`.

    A subclass declares `uses: Literal["group.name"] = "group.name"` and
    version    raise it whenever the same parameters give other bytes
    libraries  distributions whose version decides bytes
    accepts    layouts of the checkpoint before it
    sparse     whether it takes a checkpoint with masks
    compresses whether it works on the linear layers of the blocks, so that these have to be what the blocks are made of
    reads      the part of the recipe's data it reads, and so depends on
    extra      the extra of edgepress whose packages it needs, if any
    metrics    names of what `run` returns (`*` stands for any), so that a gate on no metric is refused while planning
    """

    uses: str
    version: ClassVar[int] = 1
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers")
    accepts: ClassVar[frozenset[Layout]] = frozenset({"dense"})
    sparse: ClassVar[bool] = False
    compresses: ClassVar[bool] = False
    reads: ClassVar[Reads] = "nothing"
    extra: ClassVar[str | None] = None
    metrics: ClassVar[tuple[str, ...]] = ("*",)

    def data_read(self) -> Reads:
        """`reads`, of a stage with these parameters."""
        return self.reads

    def deciding_libraries(self) -> tuple[str, ...]:
        """`libraries`, of a stage with these parameters."""
        return self.libraries

    def other_inputs(self) -> dict[str, str]:
        """Further inputs by role, each the name of a stage or `base` ({"teacher": "base"}). The role is the parameter that holds the name."""
        return {}

    def outside_inputs(self) -> dict[str, str]:
        """Further inputs from outside the recipe by role, each a model directory or a hub id (`org/name`, `org/name@revision`)."""
        return {}

    def plan(self, parent: Checkpoint, others: Mapping[str, Planned], data: DataSpec) -> Planned:
        """What this stage will make of `parent`, computed from configs alone. Must not import torch.

        Raises EdgepressError with `key` for a parameter that cannot work on this checkpoint.
        """
        raise NotImplementedError

    def check_text(self, parent: Checkpoint, data: DataSpec, seed: int) -> None:
        """Refuse text that does not hold what this stage needs, and a tokenizer that cannot encode it: what `plan` cannot tell from configs.

        parent  the checkpoint it takes, planned or real; at its path is a tokenizer
        seed    the one that `run` gets in its context
        Raises EdgepressError with `key` for a parameter of the stage or of the recipe's data. Must not import torch.
        """
        if self.data_read() == "calibration":
            check_calibration(data, parent.path, parent.vocab_size, seed)

    def run(self, inputs: Inputs, place: Workplace, data: DataSpec, context: Context) -> dict[str, float]:
        """Do the work into `place.out`; returns metrics of the method itself (fallback_layers, kept_ratio, final_loss)."""
        raise NotImplementedError


@lru_cache(maxsize=1)
def stage_kinds() -> dict[str, type[Stage]]:
    """Every kind by its `uses`: the files of tasks/kinds, then the entry points of group `edgepress.stages`."""
    package = importlib.import_module("tasks.kinds")
    modules = [importlib.import_module(f"tasks.kinds.{m.name}") for m in pkgutil.iter_modules(package.__path__)]
    found = [value for module in modules for value in vars(module).values() if isinstance(value, type) and issubclass(value, Stage)]
    found += [point.load() for point in entry_points(group="edgepress.stages")]
    kinds: dict[str, type[Stage]] = {}
    for kind in found:
        uses = kind.model_fields["uses"].default
        if not isinstance(uses, str):
            continue  # a base class of kinds
        if kinds.setdefault(uses, kind) is not kind:
            raise RuntimeError(f"two stage kinds are called {uses!r}: {kinds[uses].__module__} and {kind.__module__}")
    return dict(sorted(kinds.items()))


def check_accepts(stage: Stage, parent: Planned) -> Checkpoint:
    """The table of what can follow what, asked: returns `parent` as a checkpoint the stage takes, or raises Incompatible."""
    if not isinstance(parent, Checkpoint):
        raise Incompatible(f"{stage.uses} cannot follow {parent.words}; name the checkpoint stage before it in `needs`", key="needs")
    if parent.layout not in stage.accepts:
        others = [uses for uses, kind in stage_kinds().items() if parent.layout in kind.accepts] or ["nothing yet; it is served as it is"]
        raise Incompatible(
            f"{stage.uses} takes {' or '.join(sorted(stage.accepts))} checkpoints, not {parent.layout}; what can follow {parent.layout}: {', '.join(others)}",
            key="uses",
        )
    if stage.compresses and parent.limits.compression:
        raise Incompatible(
            f"{stage.uses} works on the linear layers of the decoder blocks, and here {parent.limits.compression}", key="uses"
        )
    if parent.sparse and not stage.sparse:
        takers = ", ".join(uses for uses, kind in stage_kinds().items() if kind.sparse)
        raise Incompatible(
            f"{stage.uses} would fill the zeros of this sparse checkpoint (masks.safetensors) in; what takes it: {takers}", key="uses"
        )
    return parent
