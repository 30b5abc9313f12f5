"""The contract of a stage: its parameters as a frozen pydantic model, a plan that needs no torch, and `run`. Imports no torch.

A kind of stage is one file with one subclass of `Stage`: in tasks/kinds, or in any installed package that names it under the entry-point
group `edgepress.stages`. Nothing else needs an edit: recipes, schema, planning, caching and measuring find it.
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
    """A planned or finished export: no stage of a model can follow it."""

    runtime: str  # the runtime that opens it: "onnxruntime", "onnxruntime-genai", "openvino", "executorch", "llama.cpp"
    change: Change  # what the exporter does to the weights: the key of the default bounds of its proof
    size_bytes: int  # estimated while planned

    @property
    def words(self) -> str:
        return f"an export, and a {self.runtime} artifact is final"


@dataclass(frozen=True)
class Corpus:
    """Planned or written text (`corpus.jsonl`): training stages read it through their parameter `corpus`, and nothing else does."""

    size_bytes: int  # estimated while planned

    @property
    def words(self) -> str:
        return "a corpus, which is text, not a model; `corpus` of a training stage names it"


Planned = Checkpoint | Artifact | Corpus


@dataclass(frozen=True)
class Inputs:
    """The directories that a stage reads.

    Attributes:
        parent: The checkpoint before it.
        others: What it declared in `other_inputs` and `outside_inputs`, by role.
        origin: The base model, for exports, which may write it into their files.
    """

    parent: Path
    others: Mapping[str, Path]
    origin: Origin | None = None


@dataclass(frozen=True)
class Workplace:
    """The directories that a stage writes.

    Attributes:
        out: Becomes the stage's content in the store when `run` returns; empty at the start.
        work: Kept until then, also over a crash: training checkpoints, the progress of a walk.
        shared: Results that several stages of this store share (the outputs of a teacher); None: use `work`.
    """

    out: Path
    work: Path
    shared: Path | None = None


class Stage(Settings):
    """Base of every stage kind. Its fields are parameters and part of its identity; so are `version` and `libraries`.

    A subclass declares `uses: Literal["group.name"] = "group.name"`.

    Attributes:
        version: Raise it whenever the same parameters give other bytes.
        libraries: The distributions whose version decides bytes.
        accepts: The layouts of the checkpoint before it.
        sparse: Whether it accepts a checkpoint with masks.
        compresses: Whether it compresses the linear layers of the decoder blocks, so that the blocks must consist of these.
        reads: The part of the recipe's data that it reads, and so depends on.
        extra: The extra of edgepress whose packages it needs, if any.
        added_parameters: Parameters that the kind did not have at first; at their defaults they leave the identity as it was.
        metrics: The names of what `run` returns (`*` stands for any), so that planning refuses a gate on an unknown metric.
    """

    uses: str
    version: ClassVar[int] = 1
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers")
    accepts: ClassVar[frozenset[Layout]] = frozenset({"dense"})
    sparse: ClassVar[bool] = False
    compresses: ClassVar[bool] = False
    reads: ClassVar[Reads] = "nothing"
    extra: ClassVar[str | None] = None
    added_parameters: ClassVar[frozenset[str]] = frozenset()
    metrics: ClassVar[tuple[str, ...]] = ("*",)

    def data_read(self) -> Reads:
        """Return what a stage with these parameters reads; `reads` unless a kind overrides it."""
        return self.reads

    def deciding_libraries(self) -> tuple[str, ...]:
        """Return the distributions that decide the bytes of a stage with these parameters; `libraries` unless a kind overrides it."""
        return self.libraries

    def other_inputs(self) -> dict[str, str]:
        """Return further inputs by role, each the name of a stage or `base` ({"teacher": "base"}). The role is the parameter with the name."""
        return {}

    def outside_inputs(self) -> dict[str, str]:
        """Return further inputs from outside the recipe by role, each a model directory or a hub id (`org/name`, `org/name@revision`)."""
        return {}

    def plan(self, parent: Checkpoint, others: Mapping[str, Planned], data: DataSpec) -> Planned:
        """Return what this stage will make of `parent`, computed from configs alone. Must not import torch.

        Args:
            parent: The checkpoint before it, planned or real.
            others: What `other_inputs` and `outside_inputs` name, by role.
            data: The recipe's data.

        Raises:
            EdgepressError: A parameter, named by `key`, cannot work on this checkpoint.
        """
        raise NotImplementedError

    def check_text(self, parent: Checkpoint, data: DataSpec, seed: int) -> None:
        """Refuse text that lacks what this stage needs, and a tokenizer that cannot encode it: `plan` reads configs alone. Must not import torch.

        Args:
            parent: The checkpoint before it, planned or real; its path has a tokenizer.
            data: The recipe's data.
            seed: The seed that `run` gets in its context.

        Raises:
            EdgepressError: `key` names the parameter of the stage or of the recipe's data.
        """
        if self.data_read() == "calibration":
            check_calibration(data, parent.path, parent.vocab_size, seed)

    def run(self, inputs: Inputs, place: Workplace, data: DataSpec, context: Context) -> dict[str, float]:
        """Write the stage's content into `place.out`; return metrics of the method itself (fallback_layers, kept_ratio, final_loss)."""
        raise NotImplementedError


@lru_cache(maxsize=1)
def stage_kinds() -> dict[str, type[Stage]]:
    """Return every kind by its `uses`: the files of tasks/kinds, then the entry points of group `edgepress.stages`."""
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
    """Return `parent` as a checkpoint that the stage can follow. Raises Incompatible, with what can follow it instead."""
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
            f"{stage.uses} compresses the linear layers of the decoder blocks, and here {parent.limits.compression}", key="uses"
        )
    if parent.sparse and not stage.sparse:
        takers = ", ".join(uses for uses, kind in stage_kinds().items() if kind.sparse)
        raise Incompatible(
            f"{stage.uses} would fill in the zeros of this sparse checkpoint (masks.safetensors); what takes it: {takers}", key="uses"
        )
    return parent
