"""The arithmetic and the tables of the compression benchmark, and its draws; nothing is measured here."""

from pathlib import Path

import pytest
import torch

from tests.benchmarks.bench_compression import main, render
from tests.benchmarks.compression.protocol import METHODS, Method, Subject, drawn, windows
from tests.benchmarks.compression.tables import Measured, against, against_table, results_table, size_table
from tests.benchmarks.page import PAGE, replaced

GPTQ = Method("GPTQ 4-bit g32", "gptq", ("gptqmodel", "llmcompressor"), 4, 32)
MAGNITUDE = Method("magnitude 50%", "magnitude", (), sparsity=0.5, calibrated=False)
RESULTS = {
    GPTQ: {
        "edgepress": Measured([4.0, 2.0, 3.0], [58.0, 59.0, 60.0], [300.0, 310.0, 290.0]),
        "gptqmodel": Measured([9.0, 7.0, 7.5], [59.0, 59.0, 59.0], [800.0, 700.0, 750.0]),
        "llmcompressor": Measured([6.0, 6.0, 9.0], [60.0, 61.0, 62.0], [600.0, 620.0, 610.0]),
    },
    MAGNITUDE: {"edgepress": Measured([0.5], [120.0], [400.0])},
}


def test_seconds_are_medians_perplexity_the_mean_and_memory_the_maximum() -> None:
    lines = results_table(RESULTS, floor=2.0).splitlines()
    assert lines[0] == "| method | by | seconds | / floor | perplexity | of each draw | peak RSS MB |"
    assert lines[1] == "| --- | --- | ---: | ---: | ---: | ---: | ---: |"
    assert lines[2] == "| GPTQ 4-bit g32 | edgepress | 3.00 | 1.50 | 59.000 | 58.000 59.000 60.000 | 310 |"
    assert lines[3] == "| GPTQ 4-bit g32 | gptqmodel | 7.50 | 3.75 | 59.000 | 59.000 59.000 59.000 | 800 |"
    assert lines[5] == "| magnitude 50% | edgepress | 0.50 |  | 120.000 | 120.000 | 400 |"
    assert len(lines) == 6


def test_ours_stands_against_the_better_peer_in_each_respect() -> None:
    comparison = against(RESULTS[GPTQ])
    assert comparison is not None
    assert comparison.speedup == pytest.approx(6.0 / 3.0)  # llm-compressor is the faster
    assert comparison.perplexity == pytest.approx(0.0)  # GPTQModel loses less
    assert comparison.memory == pytest.approx(310 / 620)
    assert against(RESULTS[MAGNITUDE]) is None
    assert against_table(RESULTS).splitlines()[2:] == ["| GPTQ 4-bit g32 | 2.0 | +0.00% | 0.50 |"]


def test_seconds_are_told_for_a_billion_parameters() -> None:
    assert size_table([("GPTQ", 50.0, 2100.0)], 500_000_000).splitlines()[2:] == ["| GPTQ | 50.0 | 100 | 2.10 |"]


def test_draws_are_the_first_windows_then_seeded_ones_that_do_not_overlap() -> None:
    rows = windows(torch.arange(256 * 200 + 100))
    assert rows.shape == (200, 256)
    first, second, third = drawn(rows, 3)
    assert torch.equal(first, rows[:64])
    for draw in (second, third):
        starts = draw[:, 0].tolist()
        assert len(set(starts)) == 64 and all(start % 256 == 0 for start in starts)
    assert not torch.equal(second, third)
    assert torch.equal(second, drawn(rows, 2)[1])


def test_the_part_of_a_model() -> None:
    subject = Subject("llama-6m", Path("nowhere"), (torch.zeros(64, 256),) * 3, torch.zeros(256, 256))
    floor = {"seconds": 2.0, "forward_seconds": 1.25, "hessian_seconds": 0.75, "gflops": 151.4}
    part = render(subject, 58.719, floor, {"edgepress": {"torch": "2.13.0"}, "gptqmodel": {"gptqmodel": "7.6.0"}}, RESULTS)
    assert part.startswith("### Llama-6m\n")
    assert "Perplexity 58.719 before; 256 windows of 256 tokens" in part
    assert "3 calibration draws of 64 windows of 256 tokens" in part
    assert "Edgepress with torch 2.13.0; gptqmodel with gptqmodel 7.6.0." in part
    assert "Floor 2.00 s: two forward passes of the calibration tokens 1.25 s, Hessian products 0.75 s at 151 GFLOP/s." in part
    assert results_table(RESULTS, 2.0) in part and against_table(RESULTS) in part


def test_each_command_rewrites_its_own_part_of_the_page() -> None:
    page = "# Title\n\n<!-- begin a -->\nold\n<!-- end a -->\n\n<!-- begin b -->\nkept\n<!-- end b -->\n"
    assert replaced(page, "a", "new\n") == page.replace("old\n", "\nnew\n\n")
    assert replaced(replaced(page, "a", "other"), "a", "new") == replaced(page, "a", "new")
    with pytest.raises(ValueError, match="<!-- begin c -->"):
        replaced(page, "c", "new")
    for part in ("demo", "compression of llama-6m", "compression of the reference model", "compression at size"):
        replaced(PAGE.read_text(), part, "")


def test_rows_differ_and_a_mistyped_method_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert len({method.title for method in METHODS}) == len(METHODS)
    with pytest.raises(SystemExit):
        main(["--only", "gptq,gtpq"])
    assert "there is no method gtpq" in capsys.readouterr().err
