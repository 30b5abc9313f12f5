"""The recipe's `evaluation:` section: what is measured of every stage beyond quality, speed and memory. Imports no torch.

evaluation:
  harness: [hellaswag, arc_easy, my_task.yaml]   # lm-evaluation-harness
  question_answering: questions.jsonl            # exact match and F1
  summarization: articles.jsonl                  # ROUGE-L
  suite: release                                 # latency, energy, generation sanity, red team
"""

from typing import Annotated, Literal

from pydantic import Field

from compression.settings import Settings

EMBEDDED = "embedded"
SUITE_GENERATIONS = 16

EnergySource = Literal["counters", "estimate", "off"]


class EvaluationSpec(Settings):
    """What is measured of every stage, and of the base, beyond quality, speed and memory."""

    suite: Literal["release"] | None = Field(
        None,
        description="`release` adds what a release is judged by: latency by token, energy, sanity over more generations, and the red-team set.",
    )
    samples: Annotated[int, Field(ge=0, le=50)] = Field(
        3, description="Generations to show side by side: greedy continuations of the beginnings of evaluation windows. 0 turns them off."
    )
    new_tokens: Annotated[int, Field(ge=2, le=4096)] = Field(32, description="Tokens of each generation and answer, at most.")
    limit: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Items of each harness task, of the questions and of the documents, counted from the first. Default: all."
    )
    harness: tuple[str, ...] = Field(
        (),
        description="Tasks of lm-evaluation-harness: their names, or files of tasks of your own (.yaml). Needs `edgepress[harness]`.",
    )
    num_fewshot: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Examples in front of each item of the harness's tasks. Default: as the task says."
    )
    harness_chat: bool = Field(
        False,
        description="Put the harness's prompts into the model's chat template, with examples as turns of their own, as its `--apply_chat_template`.",
    )
    question_answering: str | None = Field(
        None, min_length=1, description="Questions for exact match and F1: `embedded`, or a .jsonl file with question, answers and context."
    )
    summarization: str | None = Field(
        None, min_length=1, description="Documents for ROUGE-L: a .jsonl file with document and summary. Needs `edgepress[harness]`."
    )
    red_team: str | None = Field(
        None,
        min_length=1,
        description="Prompts that should be refused: `embedded` (a small set of ours), or a .jsonl file with category and prompt. "
        "Default: `embedded` in the release suite, else none.",
    )
    energy: EnergySource | None = Field(
        None,
        description="`counters`: where the machine tells (RAPL, NVML). `estimate`: codecarbon's estimate where it does not, under a name of "
        "its own; needs `edgepress[energy]`. Default: `estimate` in the release suite, else `counters`.",
    )

    @property
    def generations(self) -> int:
        """Return the number of texts generated for samples and sanity."""
        return max(self.samples, SUITE_GENERATIONS) if self.suite else self.samples

    @property
    def chats(self) -> bool:
        """Return whether a measurement besides the questions of the data uses the model's chat template, where it has one."""
        return self.harness_chat or any((self.question_answering, self.summarization, self.red_team_set))

    @property
    def red_team_set(self) -> str | None:
        return self.red_team or (EMBEDDED if self.suite else None)

    @property
    def energy_source(self) -> EnergySource:
        return self.energy or ("estimate" if self.suite else "counters")
