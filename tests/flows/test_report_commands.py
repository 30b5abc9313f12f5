"""`edgepress report` and `edgepress compare`, as they are typed."""

import webbrowser
from pathlib import Path

import pytest

from tasks.store.garbage import collect_garbage
from tasks.store.journal import journal
from tasks.store.store import Store
from tasks.store.summaries import SUMMARY, read_summary, summary_files, write_summary
from tests.flows.recipes import edgepress
from tests.flows.summaries import row, summary
from tests.tasks.entries import a_run


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Three runs: two with a summary, the last one without."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EDGEPRESS_STORE", raising=False)
    made = Store(tmp_path / ".edgepress")
    for number in (1, 2, 3):
        with journal(made, a_run("demo", [], outputs=str(tmp_path / "outputs"))) as opened:
            if number < 3:
                rows = [row("base", [], metrics={"accuracy": 0.9}), row("gguf", ["base"], metrics={"accuracy": 0.5 + number / 10})]
                write_summary(made, opened.run.run, summary(rows, journal=opened.run.run))
            opened.end("Completed")
    return made


def run(capfd: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    ended, out, err = edgepress(arguments, capfd)
    assert ended == code, err
    assert "Traceback" not in err
    return err if code == 2 else out


def test_the_page_of_an_older_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    told = run(capfd, "report", "demo-1")
    page = tmp_path / "outputs" / "demo" / "demo-1.html"
    assert told.strip() == str(page) and "0.600" in page.read_text() and "demo-1" in page.read_text()
    run(capfd, "report", "demo-2", "--out", "deep/two.html")
    assert "0.700" in (tmp_path / "deep" / "two.html").read_text()


def test_the_page_opens_in_a_browser(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    seen: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda url: not seen.append(url))
    run(capfd, "report", "demo-1", "--open", "--out", "one.html")
    assert seen == [(tmp_path / "one.html").as_uri()]
    monkeypatch.setattr(webbrowser, "open", lambda url: False)
    assert "no browser" in run(capfd, "report", "demo-1", "--open", "--out", "one.html", code=2)


def test_the_tables_of_an_older_run(capfd: pytest.CaptureFixture[str]) -> None:
    told = run(capfd, "report", "demo-1", "--text")
    assert "0.600" in told and "html" not in told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["report", "nope-1"], "there is no run 'nope-1'"),
        (["report"], "demo-3 has no summary"),
        (["report", "demo-1", "--text", "--open"], "leave out"),
        (["report", "demo-1", "--out", "/proc/nowhere/x.html"], "cannot be written"),
        (["report", "demo-1", "--store", "elsewhere"], "there is no store"),
        (["compare", "demo-1"], "two different runs"),
        (["compare", "demo-1", "demo-1"], "two different runs"),
        (["compare", "demo-1", "nope-1"], "there is no run 'nope-1'"),
    ],
)
def test_refusals(arguments: list[str], words: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert words in run(capfd, *arguments, code=2).replace("\n", " ")


def test_a_run_that_lives_and_one_that_was_killed(store: Store, capfd: pytest.CaptureFixture[str]) -> None:
    with journal(store, a_run("demo", [])) as opened:
        assert "is still running" in run(capfd, "report", opened.run.run, code=2)
        opened.end("Completed")
    file = store.root / "runs" / "demo-4.json"
    file.write_text(file.read_text().replace('"state": "Completed"', '"state": "Running"'))
    assert "was killed" in run(capfd, "report", "demo-4", code=2)


def test_runs_side_by_side(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    told = run(capfd, "compare", "demo-1", "demo-2")
    assert "nothing differs" in told and "+0.100" in told
    run(capfd, "compare", "demo-1", "demo-2", "--html", "both.html")
    assert "+0.100" in (tmp_path / "both.html").read_text()


def test_damaged_summaries_and_those_of_other_versions_are_refused(store: Store, capfd: pytest.CaptureFixture[str]) -> None:
    file = summary_files(store)["demo-1"]
    file.write_text("{")
    assert "demo-1.summary.json" in run(capfd, "report", "demo-1", code=2)
    file.write_text(f'{{"version": {SUMMARY + 1}, "summary": {{}}}}')
    assert f"has version {SUMMARY + 1}" in run(capfd, "report", "demo-1", code=2)


def test_a_summary_goes_with_its_run(store: Store, tmp_path: Path) -> None:
    garbage = collect_garbage(store, tmp_path / "outputs", keep_last=2, dry_run=False)
    assert [(item.kind, item.name) for item in garbage] == [("summary", "demo-1"), ("run", "demo-1")]
    assert list(summary_files(store)) == ["demo-2"] and read_summary(store, "demo-2")["journal"] == "demo-2"
