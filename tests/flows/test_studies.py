"""Studies: what may stand in `study:`, what is concluded from a run, how it is shown, and one real run."""

import base64
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from scipy.stats import ttest_1samp, ttest_rel

from compression.errors import EdgepressError
from flows.cli.study import shipped_studies
from flows.planning import load_recipe, make_plan
from flows.planning.study import Study
from flows.report.study_page import claims_rows, interval, markdown, settings_rows, study_section, svg, tables, verdict
from flows.report.study_results import Results, results
from tasks.store.store import Store
from tests.flows.recipes import edgepress, recipe
from tests.flows.test_report import row
from tests.waiting import PATIENCE

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("name", shipped_studies())
def test_every_shipped_study_plans(name: str, tmp_path: Path) -> None:
    parsed = load_recipe(shipped_studies()[name])
    study = parsed.recipe.study
    assert study is not None and parsed.recipe.name == name and parsed.recipe.model.path == "embedded"
    assert study.claims and re.search(r"arXiv \d{4}\.\d{5}|Kai, Zhu and Gong", study.paper)
    assert {branch.values["seed"] for branch in parsed.branches} == {0, 1, 2}
    plan = make_plan(parsed, Store(tmp_path))
    assert set(study.beside) <= {node.origin for node in parsed.nodes}
    assert len(plan.stages) == len(parsed.nodes) + 1
    assert Study.model_validate_json(study.model_dump_json()) == study, "as run.json keeps it"


# --- what is concluded ---


def claim(metric: str = "perplexity", **more: Any) -> dict[str, Any]:
    return {"says": "so", "metric": metric, **more}


def study(*claims: dict[str, Any], x: Mapping[str, Any] | None = None, **more: Any) -> Study:
    axis = x or {"keys": ["d.temperature"], "label": "temperature"}
    document = {
        "question": "Which?",
        "paper": "Someone",
        "finding": "this",
        "metrics": ["perplexity", "accuracy"],
        "x": axis,
        "claims": list(claims),
    }
    return Study.model_validate(document | more)


def summary(
    figures: Mapping[tuple[Any, ...], list[float]], keys: tuple[str, ...] = ("d.temperature",), metric: str = "perplexity"
) -> dict[str, Any]:
    """A run with a cell for each choice of the keys and each seed; `figures` gives the metric of each seed."""
    rows, cells = [row("base", [], metrics={metric: 1.0})], []
    for values, seeds in figures.items():
        for seed, value in enumerate(seeds):
            chosen = dict(zip(keys, values, strict=True)) | {"seed": seed}
            name = "d@" + ",".join(f"{key.rpartition('.')[2]}={text}" for key, text in chosen.items())
            rows.append(row(name, ["base"], metrics={metric: value}))
            cells.append({"values": chosen, "leaves": {"d": name}})
    return {"rows": rows, "sweep": {"keys": [*keys, "seed"], "cells": cells}, "recipe": {"seed": 0}}


def concluded(figures: Mapping[tuple[Any, ...], list[float]], *claims: dict[str, Any], **more: Any) -> Results:
    metric = claims[0]["metric"]
    return results(study(*claims, **more), summary(figures, tuple(more.pop("keys", ("d.temperature",))), metric))


TWO, ONE = [14.0, 14.1, 14.3], [15.0, 15.3, 15.2]


def test_paired_differences_have_student_intervals() -> None:
    found = concluded({(1,): ONE, (2.0,): TWO}, claim(better=2, than=[1]))
    (difference,) = found.judged[0].differences
    judge = ttest_rel(ONE, TWO).confidence_interval(0.95)
    assert difference.values == pytest.approx([1.0, 1.2, 0.9])
    assert (difference.mean - difference.reach, difference.mean + difference.reach) == pytest.approx((judge.low, judge.high))
    assert (difference.what, found.judged[0].outcome) == ("2 against 1", "agrees")


@pytest.mark.parametrize(
    ("mine", "outcome"),
    [(TWO, "agrees"), ([16.0, 16.2, 16.1], "disagrees"), ([14.0, 16.5, 14.9], "undecided"), (ONE, "undecided"), ([2.0], "undecided")],
)
def test_the_interval_decides_a_claim(mine: list[float], outcome: str) -> None:
    found = concluded({(1,): ONE, (2,): mine}, claim(better=2, than=[1]))
    assert found.judged[0].outcome == outcome
    assert outcome in verdict(found)


def test_higher_accuracy_wins_within_a_margin() -> None:
    figures = {(1,): [0.90, 0.91, 0.92], (2,): [0.89, 0.91, 0.913]}
    wanted = {"metric": "accuracy", "better": 2, "than": [1]}
    assert concluded(figures, claim(**wanted)).judged[0].outcome == "undecided"
    assert concluded(figures, claim(**wanted, within=0.02)).judged[0].outcome == "agrees"
    worse = {(1,): [0.90, 0.91, 0.92], (2,): [0.80, 0.815, 0.82]}
    assert concluded(worse, claim(**wanted, within=0.02)).judged[0].outcome == "disagrees"


def test_one_refuted_comparison_refutes_the_claim() -> None:
    found = concluded({(1,): ONE, (2,): TWO, (5,): [13.0, 13.1, 13.1]}, claim(better=2, than=[1, 5]))
    assert [difference.outcome for difference in found.judged[0].differences] == ["agrees", "disagrees"]
    assert found.judged[0].outcome == "disagrees"


LINES = {"keys": ["d.alpha"], "label": "trained on", "names": ["labels", "teacher"]}
GRID = {
    (0.75, 0): [2.0, 2.1, 2.05], (0.75, 1): [1.9, 2.0, 1.96],
    (0.5, 0): [3.0, 3.2, 3.1], (0.5, 1): [2.5, 2.8, 2.6],
}  # fmt: skip


def grid(*claims: dict[str, Any]) -> Results:
    made = study(*claims, x={"keys": ["d.keep"], "label": "kept"}, lines=LINES)
    return results(made, summary(GRID, ("d.keep", "d.alpha")))


def test_lines_are_compared_at_chosen_places() -> None:
    everywhere, there = grid(claim(better="teacher", than=["labels"]), claim(better="teacher", than=["labels"], at=[0.5])).judged
    assert [d.what for d in everywhere.differences] == ["teacher against labels at 0.75", "teacher against labels at 0.5"]
    assert there.differences == everywhere.differences[1:]
    assert everywhere.differences[0].values == pytest.approx([0.1, 0.1, 0.09])


def test_places_of_x_are_compared_on_each_line() -> None:
    (judged,) = grid(claim(better=0.75, than=[0.5])).judged
    assert [(d.what, d.mean) for d in judged.differences] == [
        ("0.75 against 0.5 at labels", pytest.approx(1.05)), ("0.75 against 0.5 at teacher", pytest.approx(0.68)),
    ]  # fmt: skip


@pytest.mark.parametrize(("extra", "outcome"), [(0.3, "agrees"), (0.0, "undecided"), (-0.3, "disagrees")])
def test_compounding_exceeds_the_sum(extra: float, outcome: str) -> None:
    """Log-perplexities made of a cost of each axis, noise that cancels in no seed, and `extra` where both are applied."""
    noise = iter([0.01, -0.012, 0.004, 0.007, -0.006, 0.011, -0.009, 0.003, 0.005, -0.008, 0.002, 0.006])
    cost = {(bits, keep): (0.4 if bits == 3 else 0.0) + (0.7 if keep == 0.5 else 0.0) for bits in (8, 3) for keep in (1, 0.5)}
    figures = {
        place: [math.exp(value + next(noise) + (extra if place == (3, 0.5) else 0.0)) for _ in range(3)] for place, value in cost.items()
    }
    made = study(claim(compounds={"x": 8, "line": 1}), x={"keys": ["d.bits"], "label": "bits"}, lines={"keys": ["d.keep"], "label": "kept"})
    (judged,) = results(made, summary(figures, ("d.bits", "d.keep"))).judged
    (difference,) = judged.differences
    logs = {place: [math.log(value) for value in values] for place, values in figures.items()}
    contrast = [logs[3, 0.5][s] - logs[3, 1][s] - logs[8, 0.5][s] + logs[8, 1][s] for s in range(3)]
    assert difference.values == pytest.approx(contrast)
    assert (difference.mean - difference.reach) == pytest.approx(ttest_1samp(contrast, 0).confidence_interval(0.95).low)
    assert (difference.what, judged.outcome) == ("3 with 0.5", outcome)


def test_missing_metrics_leave_claims_undecided() -> None:
    run = summary({(1,): ONE, (2,): TWO, (5,): [13.0, 13.1, 13.1]})
    for unmeasured in run["rows"][1:4]:
        unmeasured["metrics"] = {"accuracy": 0.5}
    run["rows"][4]["metrics"] = {}  # one seed of the second setting
    found = results(study(claim(better=5, than=[1, 2])), run)
    nothing, paired = found.judged[0].differences
    assert (interval(nothing), nothing.outcome) == ("not measured", "undecided")
    assert paired.values == pytest.approx([1.0, 1.2])
    assert found.judged[0].outcome == "undecided" and "| not measured | undecided |" in markdown(found)
    grid = study(claim(compounds={"x": 1, "line": "labels"}), x={"keys": ["d.keep"], "label": "kept"}, lines=LINES)
    run = summary({place: [2.0] for place in [(1, 0), (1, 1), (2, 0), (2, 1)]}, ("d.keep", "d.alpha"))
    run["rows"][-1]["metrics"] = {}
    assert [interval(difference) for difference in results(grid, run).judged[0].differences] == ["not measured"]


def test_a_picture_of_what_was_not_measured_is_empty() -> None:
    published = {"at": [1, 2], "values": {"accuracy": [1.0, 2.0]}}
    found = results(study(metrics=["accuracy"], published=published), summary({(1,): ONE, (2,): TWO}))
    assert not list(ElementTree.fromstring(svg(found)).iter(f"{SVG}svg"))[1:]


# --- how it is shown ---


def test_tables_give_mean_and_range_and_every_difference() -> None:
    run = summary({(1,): ONE, (2,): TWO})
    run["rows"] += [row(f"pruned@keep=0.5,seed={seed}", ["base"], metrics={"perplexity": 9.5}) for seed in (0, 1)]
    found = results(study(claim(better=2, than=[1]), beside=["pruned"]), run)
    assert settings_rows(found) == (
        ["temperature", "perplexity", "accuracy"],
        [["base", "1.000", ""], ["pruned keep=0.5", "9.500", ""], ["1", "15.167 (15.000–15.300)", ""], ["2", "14.133 (14.000–14.300)", ""]],
    )
    (shown,) = claims_rows(found)[1]
    assert shown == ["so", "perplexity", "2 against 1", interval(found.judged[0].differences[0]), "agrees"]
    assert re.fullmatch(r"\+1\.0333 \(\+0\.\d{4}…\+1\.\d{4}\)", shown[3])
    page = markdown(found)
    assert "| 2 | 14.133 (14.000–14.300) |" in page and "Of 1 claim: 1 agrees." in page
    assert len(tables(found)) == 2


def test_a_single_seed_has_no_interval() -> None:
    found = concluded({(1,): [15.0], (2,): [14.0]}, claim(better=2, than=[1]))
    assert interval(found.judged[0].differences[0]) == "+1.0000 (one seed)"
    assert found.judged[0].outcome == "undecided"


def test_the_plot_has_our_means_beside_the_published_figures() -> None:
    published = {"at": [0.5, 1, "<2>"], "values": {"perplexity": [18.5, 15.8, 14.2]}}
    found = concluded({(1,): ONE, (2,): TWO}, claim(better=2, than=[1]), published=published)
    picture = ElementTree.fromstring(svg(found))
    ours, theirs = picture.findall(f"{SVG}svg")
    heights = [[float(c.get("cy", "")) for c in panel.findall(f"{SVG}circle")] for panel in (ours, theirs)]
    assert heights[0][0] < heights[0][1] and heights[1][0] < heights[1][1] < heights[1][2], "lower perplexity stands lower"
    titles = [title.text for title in ours.iter(f"{SVG}title")]
    assert titles == ["1: 15.17", "2: 14.13"]
    words = [text.text for text in picture.iter(f"{SVG}text")]
    assert {"here", "published", "temperature", "perplexity · ↓ better", "<2>"} <= set(words)
    assert "var(--c0)" in svg(found) and "--c0: #" in svg(found), "a picture by itself knows its colours"


def test_without_published_figures_each_choice_is_drawn() -> None:
    picture = ElementTree.fromstring(svg(grid(claim(better="teacher", than=["labels"]))))
    (panel,) = picture.findall(f"{SVG}svg")
    assert len(panel.findall(f"{SVG}polyline")) == 2
    assert {"labels", "teacher"} <= {text.text for text in picture.findall(f"{SVG}text")}


def test_the_report_has_a_section_where_every_result_is_there() -> None:
    made = study(claim(better=2, than=[1]))
    run = summary({(1,): ONE, (2,): TWO})
    run["recipe"]["study"] = made.model_dump()
    section = study_section(run)
    assert "2 against 1" in section and "Of 1 claim: 1 agrees." in section
    picture = base64.b64decode(re.findall(r"base64,([^\"]+)", section)[0]).decode()
    assert picture == svg(results(made, run))
    assert study_section({**run, "recipe": {"seed": 0, "study": None}}) == ""
    run["rows"][1]["state"] = "Failed"
    assert "Nothing is concluded: 1 stage is not done." in study_section(run)


def test_a_part_of_a_study_concludes_nothing_and_says_so() -> None:
    names = {"keys": ["d.temperature"], "label": "temperature", "names": ["cold", "warm"]}
    run = summary({(1,): ONE, (2,): TWO})
    run["recipe"]["study"] = study(claim(better="warm", than=["cold"]), x=names).model_dump()
    sweep = run["sweep"]
    assert "Of 1 claim" in study_section(run)
    run["sweep"] = {**sweep, "cells": sweep["cells"][:3], "left_out": 3}
    assert "Which?" in study_section(run) and "lacks 3 results of the sweep" in study_section(run)
    run["sweep"] = None  # only of stages that all cells share
    assert "has no result of the sweep" in study_section(run) and "<img" not in study_section(run)


# --- what may stand in a recipe ---

STAGES = "  pruned: {uses: prune.width}\n"
STUDY = """\
matrix: {seed: [0, 1], pruned.keep: [1, 0.5]}
study:
  question: How much can go?
  paper: nobody
  finding: nothing
  metrics: [perplexity]
  x: {keys: [pruned.keep], label: kept}
  claims:
    - {says: what is whole is better, metric: perplexity, better: 1, than: [0.5]}
"""


@pytest.fixture
def refused(tmp_path: Path, checkpoint: Path) -> Callable[[str], str]:
    """The error of a recipe with this text after its stages."""

    def message(rest: str) -> str:
        file = tmp_path / "tried.yaml"
        file.write_text(recipe(checkpoint, STAGES, rest))
        with pytest.raises(EdgepressError) as caught:
            make_plan(load_recipe(file), Store(tmp_path / "store"))
        return str(caught.value)

    return message


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("keys: [pruned.keep]", "keys: [pruned.kep]", r"tried.yaml:\d+: study.x.keys: the matrix has no 'pruned.kep'; keys: .*pruned.keep"),
        ("better: 1,", "better: 2,", r"tried.yaml:\d+: study.claims.0: '2' is not a place of x; places: 1, 0.5"),
        ("than: [0.5]", "than: [0.25]", "'0.25' is not a place of x"),
        ("label: kept", "label: kept, names: [all]", "study.x.names: 1 names for 2 places: 1, 0.5"),
        ("label: kept", "label: kept, names: [all, all]", "study.x.names: .*two places have one name"),
        ("keys: [pruned.keep]", "keys: [stage]", "two results stand at one place"),
        ("metric: perplexity", "metric: beauty", "beauty is not a metric of which one value is better"),
        ("better: 1, than: [0.5]", "better: 1", "either `better` and `than`, or `compounds`"),
        ("better: 1, than: [0.5]", "compounds: {x: 1, line: 1}", "study has no `lines`"),
        ("  paper: nobody\n", "", "study.paper: this key is missing"),
        ("  paper: nobody\n", "  paper: nobody\n  beside: [prunde]\n", "study.beside.0: there is no stage 'prunde'"),
        ("matrix: {seed: [0, 1], pruned.keep: [1, 0.5]}\n", "", "this recipe has none"),
        (
            "[1, 0.5]}\nstudy:\n",
            "[1, 0.5], zip: true}\nstudy:\n",
            r"tried.yaml:\d+: matrix.seed: .*no seed is there for all of them: 1 has \[0\]; 0.5 has \[1\]",
        ),
        ("metrics: [perplexity]", "metrics: [size_mb, perplexty]", r"tried.yaml:\d+: study.metrics.1: no result .* 'perplexty'; did you mean 'perplexity'"),
        ("metrics: [perplexity]", "metrics: [rouge_l]", "study.metrics.0: no result of the sweep has a metric 'rouge_l'"),
        ("metric: perplexity", "metric: f1", r"tried.yaml:\d+: study.claims.0.metric: no result of the sweep has a metric 'f1'"),
        (
            "label: kept}\n  claims:\n    - {says: what is whole is better, metric: perplexity, better: 1, than: [0.5]",
            "label: kept}\n  lines: {keys: [stage], label: stage}\n  claims:\n    - {says: both, metric: kl_to_base, compounds: {x: 1, line: pruned}",
            r"tried.yaml:\d+: study.claims.0.metric: `compounds` compares logarithms, and kl_to_base may be 0",
        ),
    ],
)  # fmt: skip
def test_an_unfit_study_is_refused(refused: Callable[[str], str], old: str, new: str, words: str) -> None:
    stages = STUDY.replace(old, new, 1)
    assert stages != STUDY
    assert re.search(words, refused(stages))


# --- the command ---


def test_studies_are_listed_and_unknown_ones_refused(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = edgepress(["study"], capfd)
    assert code == 0 and all(name in out for name in shipped_studies())
    code, _, err = edgepress(["study", "kd-temprature"], capfd)
    assert code == 2 and "there is no study 'kd-temprature'" in err and "kd-temperature" in err
    Path("plain.yaml").write_text(recipe(checkpoint, STAGES.replace("}", ", keep: 0.5}")))
    code, _, err = edgepress(["study", "plain.yaml"], capfd)
    assert code == 2 and "no `study:`" in err and "Traceback" not in err


@pytest.mark.slow
def test_a_study_runs_and_concludes(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(recipe(checkpoint, STAGES, STUDY))
    environment = {k: v for k, v in os.environ.items() if k not in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "EDGEPRESS_STORE")}
    ended = subprocess.run(
        [sys.executable, "-P", "-m", "flows.cli.main", "study", "tiny.yaml", "--seeds", "2"], cwd=tmp_path,
        env={**environment, "HF_HUB_OFFLINE": "1", "TMPDIR": str(tmp_path)}, capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    folder = tmp_path / "outputs" / "tiny"
    run = json.loads((folder / "run.json").read_text())
    measured = {r["stage"]: r["metrics"]["perplexity"] for r in run["rows"]}
    assert len(measured) == 5  # the base, and two settings with two seeds
    whole, half = measured["pruned@seed=1,keep=1"], measured["pruned@seed=1,keep=0.5"]
    table = (folder / "study.md").read_text()
    assert f"| 1 | {whole:.3f} |" in table and f"| 0.5 | {half:.3f} |" in table
    difference = "agrees" if half > whole else "disagrees"  # pruning draws nothing: both seeds give the same
    assert f"| {half - whole:+.4f} ({half - whole:+.4f}…{half - whole:+.4f}) | {difference} |" in table
    assert f"1 {difference}" in ended.stdout
    assert ElementTree.parse(folder / "study.svg").getroot().tag == f"{SVG}svg"
