"""Descriptions of runs in MLflow, within the length of a tag."""

from tasks.measurement.gates import Verdict
from tasks.planned_stage import Result
from tasks.stage_tracking import describe_stage
from tasks.tracking.calls import LONGEST
from tasks.tracking.descriptions import fitted, results_table, steps_table

METRICS = {"accuracy": 0.9, "perplexity": 4.0, "kl_to_base": 0.1, "size_mb": 3.0, "tokens_per_second": 480.0, "peak_memory_mb": 41.0}


def steps(count: int) -> str:
    return steps_table([(number, f"stage-{number}", "c" * 32, "Completed", METRICS) for number in range(count)], "#/experiments/1/runs/")


def test_only_last_rows_are_left_out() -> None:
    points = [f"- **PASS** stage-{number}: perplexity 4 is at most 9" for number in range(40)]
    text = fitted(["80 stages.", "", "- a result"], steps(80), points)
    assert LONGEST - 200 < len(text) <= LONGEST
    above, result, table, more, listed = text.split("\n\n")
    assert (above, result, listed.splitlines()) == ("80 stages.", "- a result", points)
    kept = table.splitlines()
    assert kept == steps(80).splitlines()[: len(kept)] and more == f"and {82 - len(kept)} more"


def test_short_description_is_complete() -> None:
    assert fitted(["3 stages."], steps(3), ["- **PASS** x"]) == f"3 stages.\n\n{steps(3)}\n\n- **PASS** x"


def test_points_leave_half_to_table() -> None:
    text = fitted(["x" * 9000], steps(80), [f"- warning {number}: {'w' * 100}" for number in range(200)])
    assert len(text) <= LONGEST and text.count(" more") == 2 and "…" in text
    assert text.count("| [stage-") >= 15 and text.count("- warning") >= 15


def test_results_table_fits() -> None:
    rows = {"base": {"accuracy": 0.9, "size_mb": 12.0}, "gguf": METRICS, "broken": {}}
    assert results_table(rows).splitlines() == [
        "| result | accuracy | perplexity | KL to base | size MB | decode t/s |", "|---|---:|---:|---:|---:|---:|",
        "| base | 0.900 |  |  | 12.00 |  |", "| gguf | 0.900 | 4.000 | 0.1 | 3.00 | 480 |", "| broken |  |  |  |  |  |",
    ]  # fmt: skip
    many = results_table({f"cell-{number}": METRICS for number in range(200)})
    assert len(many) <= LONGEST // 4 and many.splitlines()[-1].startswith("and ")
    assert results_table({"base": {}}) == ""


def test_many_figures_keep_verdict_and_warning() -> None:
    figures = {f"harness.task-{number:03d}.acc": 0.5 for number in range(300)}
    result = Result("q", "quantize.rtn", ["base"], "Completed", seconds=1.0, warnings=["slower than its parent"])
    result.verdicts = [Verdict("accuracy", "FAIL", "accuracy 0.5 is not at least 0.6")]
    text = describe_stage(result, {"q": figures, "base": figures})
    assert len(text) <= LONGEST and text.endswith("- **FAIL** accuracy 0.5 is not at least 0.6\n- warning: slower than its parent")
