from flows.planning import load_recipe
from tests.benchmarks.bench_scale import CELLS, COUNT, DATA, STAGES, Row, render
from tests.flows.recipes import recipe


def test_the_part_of_the_page():
    page = render([Row("local", 1, 60.0), Row("dask", 1, 80.4), Row("local", 2, 33.0), Row("dask", 2, 44.0)])
    assert "| local | 60 | 33 | 0.55 |\n| dask | 80 | 44 | 0.55 |" in page


def test_the_sweep_is_a_recipe(tmp_path):
    (tmp_path / "sweep.yaml").write_text(recipe("embedded", STAGES, CELLS, DATA))
    assert len(load_recipe(tmp_path / "sweep.yaml").branches) == COUNT
