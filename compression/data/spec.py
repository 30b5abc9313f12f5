"""The recipe's `data:` section. Imports no torch.

data: embedded                       # the built-in world: text and questions of compression/reference/world.py
data:
  text: {path: corpus/, splits: {train: train.jsonl, test: test.jsonl}, column: text}
  questions: {path: tau/commonsense_qa, revision: <commit>, splits: {train: train, test: validation}}
  length: 512
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from compression.settings import Settings

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
Embedded = Literal["embedded"]
EMBEDDED = {
    "text": "embedded",
    "questions": "embedded",
    "length": 384,
    "evaluation_windows": 32,
    "evaluation_questions": 120,
}  # `data: embedded`


class Source(Settings):
    """Records in local files or in a hub data set.

    A local directory holds a file or folder per split (`train.jsonl`, `train-00000-of-00002.parquet`, `train/*.txt`).
    A single local file is divided by a stable hash of each record: 90% train, 5% validation, 5% test.
    """

    path: str = Field(min_length=1, description="A directory, a .txt, .jsonl or .parquet file, or the id of a hub data set.")
    revision: str | None = Field(None, description="Commit, branch or tag of a hub data set; resolved to a commit before anything runs.")
    config: str | None = Field(None, description="Configuration of a hub data set (wikitext-2-raw-v1).")
    splits: dict[Split, str] | None = Field(
        None,
        min_length=1,
        description="Which split, file or folder of the source serves as train, validation and test. Default: those of the same names.",
    )


S = TypeVar("S", bound=Source)


class TextSource(Source):
    """Documents. In .txt files they are separated by blank lines; elsewhere a record is a document."""

    column: str = Field("text", min_length=1, description="Column that holds the text; .txt files have none.")


class QuestionSource(Source):
    """Multiple-choice items in CommonsenseQA's shape: question, choices {label, text}, answerKey, and optionally passage.

    `path: embedded` takes those of the built-in world.
    """

    system: str | None = Field(
        None,
        min_length=1,
        description="System message in front of every question, where the model has a chat template; some insist on one.",
    )


def outside(source: "Embedded | S | None") -> "S | None":
    """A source that is not the built-in world (`embedded`, or `path: embedded`), which is None here."""
    return None if source is None or source == "embedded" or source.path == "embedded" else source


class DataSpec(Settings):
    """What is trained on, calibrated with and measured on, and how much of it."""

    text: Embedded | TextSource = Field(description="Running text for training, calibration and perplexity.")
    questions: Embedded | QuestionSource | None = Field(
        None, description="Multiple-choice items for accuracy. Without any, none is measured."
    )
    length: Annotated[int, Field(ge=8, le=131072)] = Field(256, description="Tokens per training row and per window.")
    train_documents: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Training documents, counted from the first. Default: all, and 4,000 of the embedded world."
    )
    train_questions: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Training questions, counted from the first. Default: all, and 2,000 of the embedded world."
    )
    calibration_windows: Annotated[int, Field(ge=1)] = Field(64, description="Windows drawn from the training text for calibration.")
    evaluation_windows: Annotated[int, Field(ge=1)] = Field(64, description="Windows of test text for perplexity and KL, at most.")
    evaluation_questions: Annotated[int, Field(ge=1)] = Field(200, description="Test questions for accuracy, at most.")

    @property
    def system(self) -> str | None:
        """The system message in front of every question that is put into a chat template."""
        return self.questions.system if isinstance(self.questions, QuestionSource) else None

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, value: Any) -> Any:
        return EMBEDDED if value == "embedded" else value

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler | Callable[..., Any]) -> JsonSchemaValue:
        return {
            "anyOf": [{"const": "embedded"}, handler(core)],
            "description": "`embedded`, or a mapping that says where text and questions come from.",
        }
