import pytest

from tasks.measurement.figures import FIGURES, contended, measured, most_contended, noise, noise_text, within_noise

ACCURACY = next(figure for figure in FIGURES if figure.metric == "accuracy")


def test_noise_is_interval_or_standard_errors() -> None:
    assert noise({"accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.7, "accuracy_stderr": 0.01}, "accuracy") == (0.4, 0.7)
    assert noise({"accuracy": 0.5, "accuracy_stderr": 0.1}, "accuracy") == pytest.approx((0.304, 0.696))
    assert noise({"accuracy": 0.5}, "accuracy") is None
    assert noise_text({"accuracy": 0.5, "accuracy_stderr": 0.1}, ACCURACY) == "0.304–0.696"


@pytest.mark.parametrize(("other", "expected"), [(0.52, True), (0.6, True), (0.64, False), (0.36, False), (0.45, True)])
def test_errors_add_in_squares(other: float, expected: bool) -> None:
    """Two standard errors of 0.05 make 0.0707: 1.96 times that is 0.1386."""
    first, second = ({"accuracy": value, "accuracy_stderr": 0.05} for value in (0.5, other))
    assert within_noise(first, second, "accuracy") is within_noise(second, first, "accuracy") is expected


def test_facing_sides_decide() -> None:
    low = {"perplexity": 10.0, "perplexity_low": 5.0, "perplexity_high": 10.5}
    high = {"perplexity": 12.0, "perplexity_low": 11.5, "perplexity_high": 30.0}
    assert within_noise(low, high, "perplexity") is False
    assert within_noise(low, {"perplexity": 12.0}, "perplexity") is None


def test_harness_tasks_are_figures() -> None:
    names = ["acc", "acc_stderr", "acc_low", "acc_high", "acc_delta", "acc_delta_low", "count", "word_perplexity", "word_perplexity_ratio"]
    found = measured([{f"harness.arc.easy.{name}": 1.0 for name in names}])
    assert [(f.heading, f.better) for f in found] == [("arc.easy acc", 1), ("arc.easy word_perplexity", -1)]


def test_harness_filters_and_unknown_directions() -> None:
    names = [
        "gsm8k.exact_match.strict-match",
        "gsm8k.exact_match.strict-match_stderr",
        "x.word_perplexity.first",
        "crows.likelihood_diff",
        "wmt.ter",
    ]
    found = measured([{f"harness.{name}": 1.0 for name in names}])
    assert [(f.heading, f.better) for f in found] == [
        ("gsm8k exact_match strict-match", 1), ("x word_perplexity first", -1), ("crows likelihood_diff", 0), ("wmt ter", -1),
    ]  # fmt: skip


def test_only_measured_figures_have_columns() -> None:
    assert [f.metric for f in measured([{"size_mb": 1.0}, {"accuracy": 0.5, "other": 1.0}])] == ["accuracy", "size_mb"]
    assert next(f for f in FIGURES if f.metric == "parameters").text({"parameters": 2.5e6}) == "2.50"


def test_plain_figure_has_no_column() -> None:
    assert [figure.metric for figure in measured([{"sparsity": 0.0}, {"sparsity": 1e-6, "size_mb": 0.0}])] == ["size_mb"]
    assert [figure.metric for figure in measured([{"sparsity": 0.0}, {"sparsity": 0.5}])] == ["sparsity"]


def test_waiting_threads_make_timings_contended() -> None:
    busy = {"cpu_wait_share": 0.4, "latency_cpu_wait_share": 0.02}
    assert contended(busy, "tokens_per_second") and not contended(busy, "token_seconds_p95") and not contended(busy, "size_mb")
    assert most_contended(busy) == 0.4 and most_contended({"cpu_wait_share": 0.05}) == 0.0
