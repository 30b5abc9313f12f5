"""`synthesize`: a model writes its own corpus."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from compression.checkpoints.checkpoint import Checkpoint
from compression.context import Context
from compression.data import DataSpec, documents
from compression.data.fill import check_prompts
from compression.data.plain import plain_tokenizer
from compression.data.rows import prompts_of, start_token
from compression.errors import Incompatible
from compression.synthesis.settings import SynthesisSettings
from tasks.stage import Corpus, Inputs, Planned, Reads, Stage, Workplace

_BYTES_A_TOKEN = 4  # of text, roughly


class Synthesize(Stage):
    """The checkpoint writes a corpus; stages that train read it through their parameter `corpus` in place of the training text."""

    uses: Literal["synthesize"] = "synthesize"
    version: ClassVar[int] = 1
    metrics: ClassVar[tuple[str, ...]] = ("documents", "tokens", "sampled", "duplicates", "too_short", "cut")
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "tokenizers")
    sparse: ClassVar[bool] = True

    documents: Annotated[int | None, Field(ge=1, examples=[1000], description="How many documents to keep; give this or `tokens`.")] = None
    tokens: Annotated[
        int | None, Field(ge=1, examples=[100_000], description="How many tokens to keep, in whole documents; give this or `documents`.")
    ] = None
    length: Annotated[int, Field(ge=8, description="Tokens of a document at most, its beginning included.")] = 256
    temperature: Annotated[float, Field(gt=0, description="Logits are divided by it.")] = 1.0
    top_p: Annotated[
        float,
        Field(gt=0, le=1, description="Draw from the likeliest tokens that hold this share of the probability; a tiny one is greedy."),
    ] = 1.0
    prompt_tokens: Annotated[
        int, Field(ge=0, description="Begin with so many tokens of training documents; 0 lets the model begin, and reads no data.")
    ] = 0
    min_tokens: Annotated[int, Field(ge=1, description="Documents to which the model wrote fewer tokens are dropped.")] = 8
    batch_size: Annotated[int, Field(ge=1, description="Documents written at once.")] = 32

    def data_read(self) -> Reads:
        return "training" if self.prompt_tokens else "nothing"

    def settings(self) -> SynthesisSettings:
        return SynthesisSettings(**{field.name: getattr(self, field.name) for field in fields(SynthesisSettings)})

    def plan(self, parent: Checkpoint, others: Mapping[str, Planned], data: DataSpec) -> Planned:
        self.settings().check_prompts(self.prompt_tokens)
        if self.length > parent.max_length:
            raise Incompatible(f"documents of {self.length} tokens are longer than the model's {parent.max_length} positions", key="length")
        return Corpus(size_bytes=_BYTES_A_TOKEN * (self.tokens or (self.documents or 0) * self.length))

    def check_text(self, parent: Checkpoint, data: DataSpec, seed: int) -> None:
        start_token(plain_tokenizer(parent.path))
        if self.prompt_tokens:
            check_prompts(data, parent.path, self.prompt_tokens)

    def run(self, inputs: Inputs, place: Workplace, data: DataSpec, context: Context) -> dict[str, float]:
        from compression.checkpoints.loading import load_tokenizer
        from compression.synthesis.synthesize import synthesize

        prompts = prompts_of(documents(data, "train"), load_tokenizer(inputs.parent), self.prompt_tokens) if self.prompt_tokens else None
        return synthesize(inputs.parent, place.out, settings=self.settings(), prompts=prompts, workdir=place.work, context=context)
