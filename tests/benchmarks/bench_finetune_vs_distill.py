"""What brings a pruned model back: `python -m tests.benchmarks.bench_finetune_vs_distill` runs flows/studies/finetune-vs-distill.yaml
with several seeds and writes its part of docs/benchmarks.md. About half an hour on two cores.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.benchmarks import page

PART = "finetune-vs-distill"
STUDY = Path(__file__).resolve().parents[2] / "flows" / "studies" / "finetune-vs-distill.yaml"

Summary = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="another number is printed, not written")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], help="as of `edgepress run`; the result is printed, not written"
    )
    parser.add_argument("--folder", type=Path, help="keep the store here, to go on after a stop; default: a temporary directory")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edgepress-bench-") as temporary:
        summaries = [run(given.folder or Path(temporary), seed, given.overrides) for seed in range(given.seeds)]
    body = render(summaries)
    if given.seeds == parser.get_default("seeds") and not given.overrides:
        page.rewrite(PART, body)
    else:
        print(body)


def run(folder: Path, seed: int, overrides: list[str]) -> Summary:
    folder.mkdir(parents=True, exist_ok=True)
    settings = [word for override in [f"seed={seed}", *overrides] for word in ("--set", override)]
    subprocess.run([sys.executable, "-P", "-m", "flows.cli", "run", str(STUDY), *settings], cwd=folder, check=True)
    return json.loads((folder / "outputs" / "finetune-vs-distill" / "run.json").read_text())


def render(summaries: list[Summary]) -> str:
    """The part of the page: one row for each model, mean and range over the seeds."""
    runs = [{row["stage"]: row["metrics"] for row in summary["rows"]} for summary in summaries]
    machine, base = summaries[0]["environment"]["machine"], runs[0]["base"]
    ratios = [name.removeprefix("kept-") for name in runs[0] if name.startswith("kept-")]
    settings = summaries[0]["recipe"]["stages"][f"distilled-{ratios[0]}"]
    metrics = ("accuracy", "perplexity", "kl_to_base")
    rows = [["1", "as it was", f"{base['accuracy']:.3f}", f"{base['perplexity']:.3f}", ""]]
    rows += [["1", "cross-entropy", *(spread(runs, "finetuned-100", metric) for metric in metrics)]]
    for ratio in ratios:
        reached = f"{runs[0][f'kept-{ratio}']['kept_ratio']:.4g}"
        rows += [
            [reached, words, *(spread(runs, f"{name}-{ratio}", metric) for metric in metrics)]
            for name, words in (("kept", "pruned"), ("finetuned", "cross-entropy"), ("distilled", "self-distillation"))
        ]
    table = page.markdown(["MLP neurons kept", "model", "accuracy", "perplexity", "KL to base"], ["---:", "---", *["---:"] * 3], rows)
    return f"""## Fine-tuning against self-distillation

Written by `make bench-recovery` on {time.strftime("%Y-%m-%d")}: {machine["processor"]}, {machine["cores"]} cores. The embedded model and data, MLP \
neurons pruned by l2 norm (`multiple_of: 32`), then {settings["steps"]} steps of {settings["batch_size"]} rows with the learning rate \
{settings["learning_rate"]:g} in {settings["precision"]}. Both recoveries see the same rows in an order of their own. Mean of {len(summaries)} seeds, the \
lowest and the highest in brackets; accuracy is of {base["accuracy_count"]:.0f} questions, its standard error about \
{base["accuracy_stderr"]:.3f} for the base.

{table}"""


def spread(runs: list[dict[str, dict[str, float]]], stage: str, metric: str) -> str:
    values = [run[stage][metric] for run in runs]
    middle = f"{statistics.fmean(values):.3f}"
    return middle if min(values) == max(values) else f"{middle} ({min(values):.3f}–{max(values):.3f})"


if __name__ == "__main__":
    main()
