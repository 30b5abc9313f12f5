"""Parameters that every training stage has, and the rows it trains on."""

from collections.abc import Callable, Mapping
from itertools import islice
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
from compression.training import TrainingSettings
from tasks.stage import Corpus, Inputs, Planned, Reads, Stage

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from compression.training import TrainingRows


class Distributed(Settings):
    """Processes that train together: on a CPU they share its threads, of GPUs each has one."""

    processes: Annotated[int, Field(ge=2, description="Each takes `batch_size` rows in one forward pass.")]


class TrainingStage(Stage, TrainingSettings):
    """Base of stages that train. A subclass adds the settings of its training function, and passes itself as these."""

    reads: ClassVar[Reads] = "training"
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "accelerate", "tokenizers")
    metrics: ClassVar[tuple[str, ...]] = (
        "loss", "loss_*", "learning_rate", "training_tokens_per_second", "steps", "resumed_from_step", "batch_size", "oom_retries",
        "validation_loss", "validation_loss_*", "best_step", "stopped_early",
    )  # fmt: skip
    sparse: ClassVar[bool] = True
    added_parameters: ClassVar[frozenset[str]] = frozenset({"max_grad_norm"})

    train_on: Annotated[Literal["text", "questions"], Field(description="Running text, or questions with the prompt masked.")] = "text"
    corpus: Annotated[str | None, Field(description="A stage (`synthesize`) whose corpus is trained on in place of `data.text`.")] = None
    validation_rows: Annotated[int, Field(ge=1, description="Rows of the validation split to evaluate on, at most.")] = 64

    distributed: Annotated[Distributed | None, Field(description="Train in several processes of this machine: {processes: 2}.")] = None

    def data_read(self) -> Reads:
        return "validation" if self.corpus else self.reads

    def other_inputs(self) -> dict[str, str]:
        return {"corpus": self.corpus} if self.corpus else {}

    def check_data(self, parent: Checkpoint, others: Mapping[str, Planned], data: DataSpec) -> None:
        """Refuse what the recipe's data does not hold, and rows longer than the model's positions."""
        for checkpoint in (parent, *(other for other in others.values() if isinstance(other, Checkpoint))):
            if checkpoint.limits.training:
                raise Incompatible(f"{checkpoint.limits.training}, so this architecture is not trained yet", key="uses")
        if self.corpus and not isinstance(others["corpus"], Corpus):
            raise Incompatible(f"{self.corpus} writes no corpus; name a stage that does (uses: synthesize)", key="corpus")
        if self.corpus and self.train_on == "questions":
            raise Incompatible("a corpus is running text, and train_on is questions; leave one of them out", key="corpus")
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

    def rows(self, inputs: Inputs, data: DataSpec) -> "TrainingRows":
        """Read what the training functions take; rows of the validation split only where there are evaluations."""
        from compression.checkpoints.loading import load_tokenizer
        from compression.data import question_rows, training_rows
        from compression.training import TrainingRows

        tokenizer = load_tokenizer(inputs.parent)
        if self.train_on == "questions":
            rows, mask = question_rows(data, tokenizer)
        else:
            rows, mask = training_rows(self._written(inputs, data), tokenizer), None
        return TrainingRows(rows, mask, self._held_out(data, tokenizer) if self.evaluate_every else None)

    def _held_out(self, data: DataSpec, tokenizer: "PreTrainedTokenizerBase") -> "tuple[Tensor, Tensor | None]":
        """Read the first `validation_rows` rows of the validation split, built like those for training."""
        import torch

        from compression.data import question_rows

        if self.train_on == "questions":
            return question_rows(self._validation_data(data), tokenizer, "validation")
        encoded = (encode_document(tokenizer, text) for text in stream_documents(data, "validation"))
        rows = list(islice(pack(encoded, data.length), self.validation_rows))
        if not rows:
            raise no_row(data, "validation")
        return torch.tensor(rows), None

    def train(self, function: Callable[..., dict[str, float]], *arguments: Any, context: Context, **parameters: Any) -> dict[str, float]:
        """Call a training function with this stage as its settings, in as many processes as `distributed` says."""
        if self.distributed is None:
            return function(*arguments, self, context=context, **parameters)
        from compression.training import in_processes

        return in_processes(self.distributed.processes, function, *arguments, self, context=context, **parameters)

    def _written(self, inputs: Inputs, data: DataSpec) -> DataSpec:
        """Return the recipe's data, with the corpus as its training text where there is one."""
        if not self.corpus:
            return data
        text = TextSource(path=str(inputs.others["corpus"]), splits={"train": CORPUS})
        return data.model_copy(update={"text": text, "train_documents": None})

    def _validation_data(self, data: DataSpec) -> DataSpec:
        """Return the recipe's data with as many questions as are evaluated on, however many the recipe measures with."""
        return data.model_copy(update={"evaluation_questions": self.validation_rows})
