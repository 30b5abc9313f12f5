"""lm-evaluation-harness on any of our runtimes: one adapter, and its results as metrics.

A task decides its prompts, metrics and few-shot examples; texts are encoded as the harness encodes them for Hugging Face models, with two differences
(compression/data/rows.py): what a tokenizer appends (EOS) is left out, because the harness would divide context and continuation in the wrong place, and
a continuation that merges completely into the context is scored alone. Few-shot examples are drawn with the harness's own fixed seed.
"""

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, set_torch_seed

from compression.context import Context
from compression.data.rows import encode_pairs, encode_prompts
from compression.errors import Incompatible, UnusableData
from compression.evaluation.findings import Findings, Items
from compression.evaluation.harness_tasks import Task, metric_name, new_tokens, refuse_sampling
from compression.evaluation.likelihood import Likelihood, continuation_likelihoods
from compression.evaluation.runtime import Runtime
from compression.evaluation.text import Text
from compression.evaluation.writing import Writer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BOOTSTRAP_DRAWS = 1000  # of the harness's standard errors that have no formula (f1, mcc, perplexity)


class HarnessModel(TemplateLM):
    """A runtime and its tokenizer as a model of the harness.

    Args:
        runtime: The loaded model.
        tokenizer: The Hugging Face tokenizer, for scored text.
        text: The runtime's own tokenizer, for generated text.
        context: Hears of progress.
    """

    def __init__(self, runtime: Runtime, tokenizer: "PreTrainedTokenizerBase", text: Text, context: Context):
        super().__init__()
        self.tokenizer, self.runtime, self.text, self.context = tokenizer, runtime, text, context

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def tokenizer_name(self) -> str:
        """A part of the keys under which the harness caches prompts; here it caches none."""
        return self.tokenizer.name_or_path

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation as text. Raises Incompatible where the template refuses it."""
        from jinja2 import TemplateError

        try:
            rendered = self.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt, continue_final_message=not add_generation_prompt
            )
        except TemplateError as error:
            raise Incompatible(f"the model's chat template refuses a prompt of the harness: {error}", key="harness_chat") from None
        return str(rendered)

    @property
    def prefix_token_id(self) -> int:
        """The token in front of a text without a prompt."""
        found = [token for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id) if token is not None]
        if not found:
            raise Incompatible(
                "the tokenizer has neither a begin nor an end of text, behind which the harness scores texts without a prompt"
            )
        return found[0]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Encode, with or without what the tokenizer puts in front of a text; what it appends (EOS) would end a text that is to be continued."""
        if add_special_tokens is False:
            return list(self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"])
        return encode_prompts(self.tokenizer, [string])[0]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encode as the data's questions are: the harness's rule, except for tokenizers that append EOS and continuations that merge into the context."""
        ((tokens, own),) = encode_pairs(self.tokenizer, context, [continuation])
        return tokens or [self.prefix_token_id], own

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:  # fmt: skip
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > self.runtime.max_length:
            raise UnusableData(f"a continuation of {longest} tokens does not fit into the model's {self.runtime.max_length}", key="harness")
        return [
            (found.log_probability, found.greedy) for found in self._score([(prompt, continuation) for _, prompt, continuation in requests])
        ]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of complete texts: windows of the model's length, each token predicted once with as much context as fits."""
        windows: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.runtime.max_length, context_len=1
            )
            for window in rolling:
                windows.append(make_disjoint_window(window))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, found in zip(owners, self._score(windows), strict=True):
            totals[owner] += found.log_probability
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return greedy continuations up to end-of-text or a stop text. Raises Incompatible for a task that samples."""
        texts = []
        for request in requests:
            prompt, settings = request.args
            refuse_sampling(request.task_name or "", settings)
            until = settings.get("until") or []
            stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
            writer = Writer(self.runtime, self.text, new_tokens(settings))
            texts.append(writer.continue_from(self.tok_encode(prompt), stops).text)
            self.context.progress(len(texts), len(requests), "answers")
        return texts

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Likelihood]:
        return continuation_likelihoods(self.runtime, pairs, self.context)


def evaluate_tasks(
    model: HarnessModel, tasks: Sequence[Task], *, limit: int | None, num_fewshot: int | None, chat: bool = False, system: str | None = None
) -> Findings:  # fmt: skip
    """Run tasks of the harness.

    Args:
        model: The adapter.
        tasks: By name or file.
        limit: Items of each task, counted from the first; None takes all.
        num_fewshot: Examples in front of each item; None leaves it to the task, and a task that says 0 keeps 0.
        chat: Put prompts into the model's chat template, few-shot examples as turns before them.
        system: Message in front of such a conversation.

    Returns:
        For each task and group harness.{task}.{metric}, harness.{task}.{metric}_stderr where there is one, and harness.{task}.count. The name
        of a filter other than `none` follows the metric. Where a metric is the mean of a value for each item, these are its items. In
        `details` by harness.{task} its version, number of items and few-shot examples.

    Raises:
        UnusableData: A data set cannot be reached.
        Incompatible: A task that this adapter, or the harness without further permission, does not run.
    """
    named = [task for task in tasks if task.file is None]
    manager = TaskManager(include_defaults=bool(named))  # the index of all tasks takes seconds
    random.seed(DEFAULT_RANDOM_SEED)  # as lm_eval.simple_evaluate: some tasks shuffle their choices with these
    np.random.seed(DEFAULT_OTHER_SEED)
    set_torch_seed(DEFAULT_OTHER_SEED)
    with _harness_errors():
        loaded = manager.load([str(task.file) if task.file else task.name for task in tasks])
        for task in loaded["tasks"].values():
            _set_fewshot(task, num_fewshot)
        results = evaluate(
            model,
            loaded,
            limit=limit,
            bootstrap_iters=BOOTSTRAP_DRAWS,
            log_samples=True,
            apply_chat_template=chat,
            system_instruction=system if chat else None,
            fewshot_as_multiturn=chat,
        )
    assert results is not None  # of the first process, which this is
    return _findings(results)


def _set_fewshot(task: Any, num_fewshot: int | None) -> None:
    """Set examples as lm_eval.simple_evaluate does, which also runs git and pip to describe this machine."""
    own = task.get_config("num_fewshot")
    if own is None or (num_fewshot is not None and own != 0):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


@contextmanager
def _harness_errors() -> Iterator[None]:
    """Raise our errors for what the harness and the hub raise for a task that cannot run; and start no pool of processes within a child."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    os.environ["DISABLE_MULTIPROC"] = "1"  # read by the harness when it bootstraps a standard error
    try:
        yield
    except (ConnectionError, FileNotFoundError, HfHubHTTPError, datasets.exceptions.DatasetsError) as error:
        raise UnusableData(f"the data of a harness task cannot be read: {error}", key="harness") from error
    except ValueError as error:
        if "unsafe" not in str(error) and "multimodal" not in str(error):
            raise
        raise Incompatible(f"the harness does not run this task: {error}", key="harness") from error


def _findings(results: Mapping[str, Any]) -> Findings:
    metrics: dict[str, float] = {}
    items: dict[str, Items] = {}
    for task, found in results["results"].items():
        for key, value in found.items():
            if isinstance(value, float | int) and "," in key:
                metric, _, chosen = key.partition(",")
                metrics[metric_name(task, metric, chosen)] = float(value)
        if task in results["n-samples"]:
            metrics[metric_name(task, "count")] = float(results["n-samples"][task]["effective"])
    for task, samples in (results.get("samples") or {}).items():
        items |= _items(task, samples, metrics)
    details = {
        f"harness.{task}": {
            "version": version,
            "count": results["n-samples"].get(task, {}).get("effective"),
            "num_fewshot": results["n-shot"].get(task),
        }
        for task, version in results["versions"].items()
    }
    return Findings(metrics, items, details)


def _items(task: str, samples: Sequence[Mapping[str, Any]], metrics: Mapping[str, float]) -> dict[str, Items]:
    """Return the values that metrics are means of, where the harness reports them item by item and their mean is the metric."""
    columns: dict[str, list[float]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            if isinstance(sample[metric], float | int):
                columns.setdefault(metric_name(task, metric, sample["filter"]), []).append(float(sample[metric]))
    return {
        name: Items(tuple(values), (1.0,) * len(values))
        for name, values in columns.items()
        if name in metrics and abs(sum(values) / len(values) - metrics[name]) < 1e-9
    }
