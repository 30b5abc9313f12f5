"""Parameters that every training stage has, and the rows it trains on."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from compression.checkpoints.checkpoint import Checkpoint
from compression.context import Context
from compression.data import DataSpec, TextSource
from compression.data.fill import check_training
from compression.data.rows import encode_document, no_row, pack
from compression.data.sources import documents, questions, stream_documents
from compression.data.spec import outside
from compression.errors import Incompatible, UnusableData
from compression.settings import Settings
from compression.synthesis.settings import CORPUS
from compression.training.settings import Precision, Schedule, TrainingSettings
from tasks.stage import Corpus, Inputs, Planned, Reads, Stage

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


class Distributed(Settings):
    """Processes that train together: on a CPU they share its threads, of GPUs each has one."""

    processes: Annotated[int, Field(ge=2, description="Each takes `batch_size` rows in one forward pass.")]


class TrainingStage(Stage):
    """Base of stages that train. A subclass adds its loss."""

    reads: ClassVar[Reads] = "training"
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "accelerate", "tokenizers")
    metrics: ClassVar[tuple[str, ...]] = (
        "loss", "loss_*", "learning_rate", "training_tokens_per_second", "steps", "resumed_from_step", "batch_size", "oom_retries",
        "validation_loss", "validation_loss_*", "best_step", "stopped_early",
    )  # fmt: skip
    sparse: ClassVar[bool] = True

    train_on: Annotated[Literal["text", "questions"], Field(description="Running text, or questions with the prompt masked.")] = "text"
    corpus: Annotated[str | None, Field(description="A stage (`synthesize`) whose corpus is trained on in place of `data.text`.")] = None
    steps: Annotated[int, Field(ge=1, description="Optimizer steps.")] = 300
    batch_size: Annotated[int, Field(ge=1, description="Rows in one forward pass.")] = 8
    gradient_accumulation: Annotated[int, Field(ge=1, description="Forward passes in one optimizer step.")] = 1
    learning_rate: Annotated[float, Field(gt=0, description="Peak of the schedule.")] = 1e-4
    schedule: Annotated[
        Schedule, Field(description="Of the learning rate after its rise: to zero along a cosine or a line, or constant.")
    ] = "cosine"
    warmup_ratio: Annotated[float, Field(ge=0, lt=1, description="Share of the steps over which the learning rate rises.")] = 0.05
    weight_decay: Annotated[float, Field(ge=0, description="AdamW's, on matrices.")] = 0.0
    precision: Annotated[Precision, Field(description="Of matrix products; weights stay float32. float16 needs a GPU.")] = "float32"
    gradient_checkpointing: Annotated[
        bool, Field(description="Compute activations again in the backward pass instead of keeping them: less memory, more time.")
    ] = False
    group_by_length: Annotated[bool, Field(description="Batches of questions of like length: less padding is computed.")] = True
    save_every: Annotated[int, Field(ge=1, description="Steps between crash-safe checkpoints.")] = 100
    save_minutes: Annotated[float, Field(ge=0, description="Also a checkpoint when so many minutes passed since the last; 0 is never.")] = (
        0.0
    )
    evaluate_every: Annotated[
        int,
        Field(ge=0, description="Steps between evaluations of the loss on the validation split; the best weights are kept. 0 is never."),
    ] = 0
    patience: Annotated[int, Field(ge=0, description="Evaluations without a lower loss after which training stops; 0 is never.")] = 0
    validation_rows: Annotated[int, Field(ge=1, description="Rows of the validation split to evaluate on, at most.")] = 64

    distributed: Annotated[Distributed | None, Field(description="Train in several processes of this machine: {processes: 2}.")] = None

    def data_read(self) -> Reads:
        return "validation" if self.corpus else self.reads

    def other_inputs(self) -> dict[str, str]:
        return {"corpus": self.corpus} if self.corpus else {}

    def settings(self) -> TrainingSettings:
        mine = type(self).model_fields
        return TrainingSettings(**{field.name: getattr(self, field.name) for field in fields(TrainingSettings) if field.name in mine})

    def check_data(self, parent: Checkpoint, others: Mapping[str, Planned], data: DataSpec) -> None:
        """Refuse what the recipe's data does not hold, rows longer than the model's positions, and settings that contradict each other."""
        self.settings()
        for checkpoint in (parent, *(other for other in others.values() if isinstance(other, Checkpoint))):
            if checkpoint.limits.training:
                raise Incompatible(f"{checkpoint.limits.training}, so this architecture is not trained yet", key="uses")
        if self.corpus and not isinstance(others["corpus"], Corpus):
            raise Incompatible(f"{self.corpus} writes no corpus; name a stage that does (uses: synthesize)", key="corpus")
        if self.corpus and self.train_on == "questions":
            raise Incompatible("a corpus is running text, and train_on asks for questions; leave one of them out", key="corpus")
        if self.train_on == "questions" and data.questions is None:
            raise Incompatible("train_on: questions needs `data.questions` in the recipe", key="train_on")
        if data.length > parent.max_length:
            raise Incompatible(
                f"rows of data.length {data.length} are longer than the model's {parent.max_length} positions", key="train_on"
            )
        source = data.questions if self.train_on == "questions" else data.text
        if self.evaluate_every and outside(source) is not None:
            read = questions if self.train_on == "questions" else documents
            try:
                read(self._validation_data(data), "validation")
            except UnusableData as error:
                raise UnusableData(f"evaluate_every needs a validation split: {error}", key="evaluate_every") from None

    def check_text(self, parent: Checkpoint, data: DataSpec, seed: int) -> None:
        on_questions = self.train_on == "questions"
        if not self.corpus:
            check_training(data, parent.path, parent.vocab_size, on_questions=on_questions)
        if self.evaluate_every:
            check_training(self._validation_data(data), parent.path, parent.vocab_size, on_questions=on_questions, split="validation")

    def rows(self, inputs: Inputs, data: DataSpec, context: Context) -> dict[str, Any]:
        """`rows` and `mask`, and where there are evaluations `validation`, as the training functions take them."""
        from compression.checkpoints.loading import load_tokenizer
        from compression.data import question_rows, training_rows

        tokenizer = load_tokenizer(inputs.parent)
        if self.train_on == "questions":
            rows, mask = question_rows(data, tokenizer)
        else:
            rows, mask = training_rows(self._written(inputs, data), tokenizer), None
        found: dict[str, Any] = {"rows": rows, "mask": mask}
        return found | {"validation": self._held_out(data, tokenizer)} if self.evaluate_every else found

    def _held_out(self, data: DataSpec, tokenizer: "PreTrainedTokenizerBase") -> "tuple[Tensor, Tensor | None]":
        """The first `validation_rows` rows of the validation split, made as those for training are."""
        import torch

        from compression.data import question_rows

        if self.train_on == "questions":
            return question_rows(self._validation_data(data), tokenizer, "validation")
        encoded = (encode_document(tokenizer, text) for text in stream_documents(data, "validation"))
        rows = list(islice(pack(encoded, data.length), self.validation_rows))
        if not rows:
            raise no_row(data, "validation")
        return torch.tensor(rows), None

    def train(self, function: Callable[..., dict[str, float]], *paths: Path, context: Context, **parameters: Any) -> dict[str, float]:
        """Call a training function, in as many processes as the recipe asks for."""
        if self.distributed is None:
            return function(*paths, context=context, **parameters)
        from compression.training.distributed import in_processes

        return in_processes(self.distributed.processes, function, *paths, context=context, **parameters)

    def _written(self, inputs: Inputs, data: DataSpec) -> DataSpec:
        """The recipe's data, with the corpus as its training text where there is one."""
        if not self.corpus:
            return data
        text = TextSource(path=str(inputs.others["corpus"]), splits={"train": CORPUS})
        return data.model_copy(update={"text": text, "train_documents": None})

    def _validation_data(self, data: DataSpec) -> DataSpec:
        """Reads no more questions than wanted, however many the recipe measures with."""
        return data.model_copy(update={"evaluation_questions": self.validation_rows})
