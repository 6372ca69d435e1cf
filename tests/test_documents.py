"""What README and docs show is run as it stands there, or parsed by the command that it is for."""

import functools
import importlib
import json
import math
import re
import shlex
from typing import Any

import pytest
import yaml

from documents import PAGES, ROOT, find_blocks, find_commands, name_page, parse_command
from new_llm import __version__
from new_llm.cli.command import write_completion
from new_llm.cli.main import COMMANDS
from new_llm.config.loading import settings_from_dict
from new_llm.experiments.config import ExperimentConfig
from new_llm.formats import format_size

LANGUAGES = {"", "bash", "python", "yaml", "text"}


@pytest.mark.parametrize("page", [page for page in PAGES if find_blocks(page, "python")], ids=name_page)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """A page's blocks run one after another, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    code = "\n".join(find_blocks(page, "python"))
    exec(compile(code, name_page(page), "exec"), {"__name__": "page"})


@pytest.mark.parametrize(
    ("page", "command"), sorted({(name_page(page), command) for page in PAGES for command in find_commands(page)})
)
def test_commands_exist_and_take_their_flags(page, command, tmp_path, monkeypatch):
    for folder in ("configs", "studies"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    words = shlex.split(command)
    if "--resume" in words:  # a run to go on with
        run = tmp_path / "runs" / words[words.index("--name") + 1]
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(ExperimentConfig().to_yaml(), encoding="utf-8")
        (run / "adapter.yaml").write_text("{}", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    parse_command(words, monkeypatch)


def read_figure(summary: dict[str, Any], name: str) -> tuple[float, ...]:
    """A study's figure and its interval; differences of models are in nats, and are told as ratios."""
    variant, _, figure = name.partition(": ")
    entry = summary["variants"][variant]
    if figure in entry.get("comparisons", {}):
        return tuple(math.expm1(entry["comparisons"][figure][end] or 0) for end in ("nats", "low", "high"))
    found = tuple(entry["figures"][figure][end] or 0 for end in ("mean", "low", "high"))
    return tuple(map(math.expm1, found)) if figure.startswith("Against ") else found


def test_the_readme_s_numbers_are_those_of_the_committed_results():
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## What we found")[1].split("\n## ")[0]
    shown, _, sources = section.partition("<!--")
    for said, file, *names in (line.split(" | ") for line in sources.splitlines() if " | " in line):
        assert said in shown
        shown = shown.replace(said, "")
        if not names:  # results that no study holds
            assert said in (ROOT / "docs/experiments" / file).read_text(encoding="utf-8")
            continue
        summary = json.loads((ROOT / "docs/experiments" / file).read_text(encoding="utf-8"))
        value, low, high = read_figure(summary, names[0].split(" / ")[0])
        if " / " in names[0]:
            value = value / read_figure(summary, names[0].split(" / ")[1])[0] - 1
        signed = f"{100 * value:+.1f} % [{100 * low:+.1f}, {100 * high:+.1f}]".replace("-", "−")
        plain = signed.partition(" [")[0]
        assert {said} & {format_size(value, low, high), format_size(value, None, None), signed, plain}, (said, signed)
    told = {line.split(" | ")[0] for line in sources.splitlines()}
    assert set(re.findall(r"[−+]?[\d.]+ %", shown)) <= told | {"95 %"}


@functools.cache
def list_flags() -> set[str]:
    """The flags of all commands, as their completion knows them."""
    return set(re.findall(r"--[\w.-]+", write_completion("bash"))) | {"--debug", "--version"}


@pytest.mark.parametrize("page", PAGES, ids=name_page)
def test_commands_and_flags_in_sentences_exist(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert set(re.findall(r"`new-llm ([a-z][\w-]*)", text)) <= set(COMMANDS)
    assert set(re.findall(r"`(--[\w.-]+)", text)) <= list_flags()


@pytest.mark.parametrize("page", [page for page in PAGES if find_blocks(page, "yaml")], ids=name_page)
def test_yaml_blocks_are_configurations(page):
    for block in find_blocks(page, "yaml"):
        assert settings_from_dict(yaml.safe_load(block), ExperimentConfig, name_page(page)).models


@pytest.mark.parametrize("page", PAGES, ids=name_page)
def test_links_between_pages_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        found = page if not target else page.parent / target
        assert found.exists(), target
        if anchor and not anchor.startswith("new_llm."):
            headings = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\s-]", "", h).strip().lower().replace(" ", "-") for h in headings], anchor


def find_object(path: str) -> object:
    """What a dotted name stands for."""
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            found = getattr(found, name)
        return found
    raise AssertionError(f"{path}: no such module")


def test_every_equation_names_what_implements_it():
    rows = re.findall(r"^\| .* \|$", (ROOT / "docs" / "mathematics.md").read_text(encoding="utf-8"), re.MULTILINE)[1:]
    assert len(rows) >= 12
    for row in rows:
        links = re.findall(r"\[`(\w+)`\]\(reference/\w+\.md#(new_llm\.[\w.]+)\)", row.split("|")[-2])
        assert links, row
        for name, path in links:
            assert callable(find_object(path))
            assert path.endswith(f".{name}")


@pytest.mark.parametrize("page", PAGES, ids=name_page)
def test_what_a_page_names_exists(page):
    text = page.read_text(encoding="utf-8")
    assert set(re.findall(r"^ *```(\w*)", text, re.MULTILINE)) <= LANGUAGES  # of which every block is tested
    for path in re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE) + re.findall(r"#(new_llm\.[\w.]+)\)", text):
        find_object(path)
    for file, test in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text):
        assert not test or f"\ndef {test}(" in (ROOT / file).read_text(encoding="utf-8"), (file, test)
    for file in re.findall(r"`((?:examples|benchmarks|studies|scripts|configs)/[\w./-]+\.\w+)`", text):
        assert (ROOT / file).is_file(), file


def test_readme_fits_three_screens():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in PAGES if ROOT / "docs" in page.parents}
    assert pages == set(re.findall(r"([\w/-]+\.md)$", text, re.MULTILINE))


def test_project_files_agree_with_the_project():
    def read(name: str) -> str:
        return (ROOT / name).read_text(encoding="utf-8")

    assert yaml.safe_load(read("CITATION.cff"))["version"] == __version__
    assert "run: .ci/run" in read(".github/workflows/ci.yml")
    hooks = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    assert {hook["repo"] for hook in hooks} == {"local"}  # nothing is fetched
    for forms in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        assert yaml.safe_load(forms.read_text(encoding="utf-8"))
    kept = {line.removeprefix("!") for line in read(".dockerignore").splitlines() if line.startswith("!")}
    copied = set(" ".join(re.findall(r"^COPY (.*) \S+$", read("Dockerfile"), re.MULTILINE)).split())
    assert copied == kept
    assert all((ROOT / name).exists() for name in copied)


def test_names_of_the_specification_lead_to_ours():
    names = re.findall(r"`(new_llm\.[\w.]+)`", (ROOT / "docs" / "specification-names.md").read_text(encoding="utf-8"))
    assert len(names) > 15
    for name in names:
        find_object(name)


@pytest.mark.parametrize("page", ["docs/life-of-a-batch.md", "docs/images/life-of-a-batch.svg"])
def test_the_life_of_a_batch_names_files_that_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    files = set(re.findall(r"\b((?:config|data|models|training|evaluation|experiments|report|cli)/[\w/]+\.py)\b", text))
    assert len(files) > 8
    assert [file for file in sorted(files) if not (ROOT / "src" / "new_llm" / file).is_file()] == []


def test_every_row_of_the_audit_names_a_test_and_modules_that_exist():
    text = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| what ")]
    assert len(rows) >= 15
    for row in rows:
        assert re.search(r"`tests/[\w/]+\.py::test_\w+` \|$", row), row
        for module in re.findall(r"`([a-z_/]+\.py)`", row):
            assert (ROOT / "src" / "new_llm" / module).is_file(), module
