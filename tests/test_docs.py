"""The documentation says what is: its examples run, its generated parts are up to date, its links lead somewhere."""

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM
from typer.main import get_command

from compression.checkpoints.checkpoint import Checkpoint, Layout
from compression.context import Context
from flows.cli.main import app
from flows.cli.reference import BEGIN, END, _outcomes, _samples, compatibility_table, recipe_reference, with_generated
from flows.planning import ParsedRecipe, json_schema, load_recipe, make_plan
from flows.planning.recipe import _entries
from tasks.runners.jobs import compute_stage
from tasks.stage import check_accepts, stage_kinds
from tasks.store.store import Store

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")] + sorted((ROOT / "docs").rglob("*.md"))
SUFFIXES = {"md", "py", "json", "yaml", "toml", "txt", "html", "jsonl", "safetensors", "gguf", "onnx"}  # of files that the text names
SMOLLM2 = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True, "dtype": "bfloat16",
    "head_dim": 64, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
}  # fmt: skip


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def written_recipe(text: str, folder: Path) -> ParsedRecipe:
    file = folder / "recipe.yaml"
    file.write_text(text)
    return load_recipe(file)


@pytest.fixture
def plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The worked example of docs/architecture.md, installed as its page says."""
    (code,), (project,) = blocks("docs/architecture.md", "python"), blocks("docs/architecture.md", "toml")
    site = tmp_path / "site"
    info = site / "edgepress_round-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "quantize_round.py").write_text(code)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: edgepress-round\nVersion: 1.0\n")
    groups = tomllib.loads(project)["project"]["entry-points"]
    (info / "entry_points.txt").write_text(
        "".join(f"[{g}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for g, points in groups.items())
    )
    monkeypatch.syspath_prepend(site)
    for cached in (stage_kinds, _entries):
        cached.cache_clear()
    yield
    sys.modules.pop("quantize_round", None)
    for cached in (stage_kinds, _entries):
        cached.cache_clear()


def test_the_worked_example_is_a_stage_like_any_other(plug_in: None, checkpoint: Path, tmp_path: Path):
    assert "quantize.round" in stage_kinds() and "prune.width" in stage_kinds()
    assert "QuantizeRoundEntry" in json_schema()["$defs"]
    text = f"model: {checkpoint}\ndata: {{text: embedded, length: 64}}\nstages:\n  rounded: {{uses: quantize.round, bits: 3}}\n"
    plan = make_plan(written_recipe(text, tmp_path), Store(tmp_path / "store"))
    assignment = plan.stages[1]
    assert isinstance(assignment.product, Checkpoint) and assignment.product.layout == "dense"

    out, work = tmp_path / "out", tmp_path / "work"
    out.mkdir()
    assert assignment.definition is not None
    metrics = compute_stage(
        stage=assignment.definition.model_dump(mode="json"), inputs={"parent": str(checkpoint)}, place={"out": str(out), "work": str(work)},
        data=plan.parsed.recipe.data.model_dump(mode="json"), threads=1, context=Context(),
    )  # fmt: skip
    assert metrics == {"levels": 7}
    before, after = load_file(checkpoint / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    rounded = [name for name in before if "_proj" in name]
    assert len(rounded) == 2 * 7
    for name, weight in before.items():
        if name not in rounded:
            np.testing.assert_array_equal(weight, after[name])
            continue
        exact, scale = weight.astype(np.float64), np.abs(weight.astype(np.float64)).max(axis=1, keepdims=True) / 3
        codes = after[name] / scale
        np.testing.assert_allclose(codes, codes.round(), atol=1e-5)
        assert set(np.unique(codes.round())) <= {-3, -2, -1, 0, 1, 2, 3}
        assert (np.abs(after[name] - exact) <= scale / 2 * (1 + 1e-5)).all()
    assert AutoModelForCausalLM.from_pretrained(out).config.intermediate_size == 128


def test_the_plug_in_is_gone_afterwards():
    assert "quantize.round" not in stage_kinds()


@pytest.mark.parametrize(("page", "made"), [("recipes.md", recipe_reference), ("compatibility.md", compatibility_table)])
def test_generated_parts_are_up_to_date(page: str, made):
    text = (ROOT / "docs" / page).read_text()
    assert text.count(BEGIN) == text.count(END) == 1
    inside = text[text.index(BEGIN) + len(BEGIN) : text.index(END)]
    assert inside == f"\n{made()}\n", f"docs/{page} is stale: run python -m flows.cli.reference"


def test_a_page_is_rewritten_between_its_markers_only():
    assert with_generated(f"above\n{BEGIN}old\n{END}below\n", "new") == f"above\n{BEGIN}\nnew\n{END}below\n"
    with pytest.raises(ValueError, match="lacks the lines"):
        with_generated(f"above\n{BEGIN}old\n", "new")


def test_the_reference_has_every_key_of_the_schema():
    text = recipe_reference()
    sections = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    schema = json_schema()
    common = sections["`stages.<name>`, of every kind"]
    for name, entry in schema["$defs"].items():
        if name.endswith("Entry"):
            own = sections[f"`uses: {entry['properties']['uses']['const']}`"]
            listed = set(re.findall(r"^\| `(\w+)` \|", own + common, re.MULTILINE))
            assert listed == entry["properties"].keys() - {"uses"}
    assert set(re.findall(r"^\| `(\w+)` \|", sections["The recipe"], re.MULTILINE)) == schema["properties"].keys()
    assert "| `sparsity` | number, above 0, below 1 | required |" in sections["`uses: prune.unstructured`"]


def test_the_compatibility_table_agrees_with_what_kinds_accept():
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in compatibility_table().splitlines() if line.startswith("| `")]
    cells = {
        line[0].strip("`"): dict(zip(get_args(Layout), line[1:-1], strict=True))
        for line in lines
        if line[-1] in ("", "yes") and len(line) == 2 + len(get_args(Layout))
    }
    assert cells.keys() == stage_kinds().keys()
    for uses, by_layout in cells.items():
        assert {layout for layout, cell in by_layout.items() if cell} == stage_kinds()[uses].accepts
    assert cells["export.gguf"]["gptq"] == "llama.cpp: float, llama.cpp: carried"
    assert cells["quantize.awq"]["dense"] == "awq checkpoint"


def test_what_a_kind_requires_is_planned_with_its_example():
    dense = _samples("llama")["dense"]
    assert any(planned.sparse for planned in _outcomes(stage_kinds()["prune.unstructured"], dense))
    assert {planned.config["intermediate_size"] for planned in _outcomes(stage_kinds()["prune.width"], dense)} == {256}


def test_the_example_recipe_is_valid(checkpoint: Path, tmp_path: Path):
    text, sweep = blocks("docs/recipes.md", "yaml")
    recipe = written_recipe(text, tmp_path)
    assert recipe.recipe.name == "small"
    assert {node.name: node.parent for node in recipe.nodes} == {
        "pruned": "base", "distilled": "pruned", "gptq": "distilled", "gguf": "gptq", "onnx": "distilled",
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(text.replace("data: embedded", "data: {text: embedded, questions: embedded, length: 64} #"))
    overrides = (f"model={checkpoint}",)
    assert len(make_plan(load_recipe(tmp_path / "recipe.yaml", overrides), Store(tmp_path / "store")).stages) == 6
    with (tmp_path / "recipe.yaml").open("a") as file:
        file.write(sweep)
    swept = make_plan(load_recipe(tmp_path / "recipe.yaml", overrides), Store(tmp_path / "store"))
    assert sorted(branch.name for branch in swept.parsed.branches) == [
        "temperature=1,bits=4", "temperature=2,bits=4,act_order=false", "temperature=2,bits=8,act_order=false", "temperature=4,bits=4",
        "temperature=4,bits=8", "temperature=8,bits=4",
    ]  # fmt: skip
    assert {"pruned", "distilled@temperature=2", "gptq@temperature=4,bits=4"} <= swept.by_name.keys()


def test_the_recipe_for_smollm2_fits_its_config(tmp_path: Path):
    (text,) = blocks("README.md", "yaml")
    parsed = written_recipe(text, tmp_path)
    recipe = parsed.recipe
    assert recipe.model.path == "HuggingFaceTB/SmolLM2-135M" and recipe.model.revision
    assert recipe.data.questions is not None and recipe.data.length <= SMOLLM2["max_position_embeddings"]
    planned = {"base": Checkpoint(tmp_path / "absent", SMOLLM2)}
    for node in parsed.nodes:
        others = {role: planned[name] for role, name in node.stage.other_inputs().items()}
        planned[node.name] = node.stage.plan(check_accepts(node.stage, planned[node.parent]), others, recipe.data)
    assert planned["pruned"].intermediate_size == 1152
    assert [planned[name].change for name in ("gguf", "genai")] == ["carried", "carried"]
    assert recipe.gates.keys() <= planned.keys()


def test_the_readme_opens_with_the_two_commands_and_names_every_command():
    text = (ROOT / "README.md").read_text()
    assert re.findall(r"^    (make \w+)", text, re.MULTILINE)[:2] == ["make demo", "make test"]
    commands = get_command(app).commands
    assert set(re.findall(r"`edgepress (\w+)", text)) == commands.keys()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        linked = page.parent / file if file else page
        assert linked.is_file(), f"{page.name} links to {target}"
        headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}


def test_the_site_builds_offline_without_warnings(tmp_path: Path):
    site = tmp_path / "site"
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", site], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, check=False,
    )  # fmt: skip
    assert (built.returncode, built.stdout + built.stderr) == (0, "")
    loaded = re.compile(r"""<(?:script|link|img)\b[^>]*?(?:src|href)=["']?https?://""")
    for page in site.rglob("*.html"):
        assert not loaded.search(page.read_text()), f"{page.relative_to(site)} loads something from the network"
    assert "export_gguf" in (site / "api" / "export.html").read_text()


CODE = re.compile(r"`([A-Za-z_][\w.]*?)(?:\(\))?`")
FILE = re.compile(r"`((?:compression|export|tasks|flows|tests|docs|docker)/[\w./-]+)`")
FOLDERS = [ROOT / name for name in ("compression", "export", "tasks", "flows", "tests", "docker")]
FOREIGN = {"DaskTaskRunner", "tasks.py", "working_dir"}  # what is not ours and the text names all the same


@pytest.fixture(scope="module")
def source_words() -> set[str]:
    """Every word of the source: names, keys, and what strings contain."""
    files = [file for folder in FOLDERS for file in folder.rglob("*") if file.suffix in (".py", ".yaml") and file != Path(__file__)]
    return set(re.findall(r"\w+", "\n".join(file.read_text() for file in files))) | {file.stem for file in files}


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_names_in_the_text_exist(page: Path, source_words: set[str]):
    code = "\n".join(re.findall(r"^```.*?^```$", page.read_text(), re.MULTILINE | re.DOTALL))
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    known = source_words | SUFFIXES | FOREIGN | set(re.findall(r"\w+", code))
    files = {file.name for folder in FOLDERS for file in folder.rglob("*.py")}
    missing = [file for file in FILE.findall(text) if not (ROOT / file).exists() and Path(file).stem not in code]
    missing += [name for name in CODE.findall(text) if not set(name.strip(".").split(".")) <= known]
    missing += [
        name for name in CODE.findall(text) if name.endswith(".py") and name not in files | FOREIGN and name.removesuffix(".py") not in code
    ]
    assert not missing, f"{page.name} names what does not exist: {', '.join(missing)}"


def test_the_first_page_is_a_valid_recipe(checkpoint: Path, tmp_path: Path):
    (text,) = blocks("docs/index.md", "yaml")
    (tmp_path / "corpus.txt").write_text("\n\n".join(f"Lamp {number} is in the mill. " * 30 for number in range(200)))
    (tmp_path / "recipe.yaml").write_text(text)
    overrides = (f"model={checkpoint}", f"data.text.path={tmp_path / 'corpus.txt'}", "data.length=64")
    plan = make_plan(load_recipe(tmp_path / "recipe.yaml", overrides), Store(tmp_path / "store"))
    assert [stage.name for stage in plan.stages] == ["base", "gptq", "gguf"]
    commands = re.findall(r"^edgepress (\w+)", "\n".join(blocks("docs/index.md", "bash")), re.MULTILINE)
    assert set(commands) <= get_command(app).commands.keys()
