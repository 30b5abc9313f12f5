"""`export.gguf`: a file for llama.cpp."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from compression.checkpoints.checkpoint import Checkpoint, Layout
from compression.context import Context
from compression.data import DataSpec
from export.gguf import GgufSettings, check_gguf
from export.gguf.types import CARRY, FLOATS, bits_per_weight
from export.proof import Change
from tasks.stage import Artifact, Inputs, Planned, Reads, Stage, Workplace


class ExportGguf(GgufSettings, Stage):
    """GGUF; `type: carry` keeps the codes of a GPTQ or AWQ checkpoint, nothing is rounded again."""

    uses: Literal["export.gguf"] = "export.gguf"
    version: ClassVar[int] = 3
    metrics: ClassVar[tuple[str, ...]] = (
        "carry_worst_difference",
        "carry_worst_difference_in_steps",
        "tokenizer_texts",
        "bits_per_weight",
        "fallback_tensors",
    )
    reads: ClassVar[Reads] = "calibration"
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "gguf", "llama-cpp-python")
    accepts: ClassVar[frozenset[Layout]] = frozenset({"dense", "gptq", "awq"})
    sparse: ClassVar[bool] = True
    extra: ClassVar[str | None] = "llamacpp"

    def data_read(self) -> Reads:
        return "calibration" if self.importance else "nothing"

    def deciding_libraries(self) -> tuple[str, ...]:
        return (*self.libraries, "tokenizers") if self.importance else self.libraries

    def plan(self, parent: Checkpoint, others: Mapping[str, Planned], data: DataSpec) -> Planned:
        check_gguf(parent, self)
        change: Change = "float" if self.type in FLOATS else "carried" if self.type == CARRY else "int8" if self.type == "q8_0" else "int4"
        return Artifact("llama.cpp", change, int(parent.num_parameters * bits_per_weight(self.type) / 8))

    def run(self, inputs: Inputs, place: Workplace, data: DataSpec, context: Context) -> dict[str, float]:
        import torch

        from compression.checkpoints.loading import load_tokenizer
        from compression.data import calibration_windows
        from export.gguf import export_gguf

        windows = calibration_windows(data, load_tokenizer(inputs.parent), context.seed) if self.importance else None
        threads = torch.get_num_threads()
        return export_gguf(inputs.parent, place.out, self, windows=windows, threads=threads, origin=inputs.origin, context=context)
