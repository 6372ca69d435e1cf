"""What README and docs show is run as it stands there, or parsed by the command that it is for."""

import argparse
import functools
import importlib.util
import json
import math
import pkgutil
import re
import runpy
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

from new_llm import __version__
from new_llm.cli.command import write_completion
from new_llm.cli.main import COMMANDS, load_command
from new_llm.config.loading import read_settings, settings_from_dict
from new_llm.experiments.config import ExperimentConfig, StudyConfig
from new_llm.formats import format_size
from tiny import ROOT, run_python

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
OTHER_PROGRAMS = {"docker", "git", "pip", "pre-commit", "scp", "tensorboard"}
"""Programs of others whose arguments are not parsed here."""


def name_page(page) -> str:
    return page.relative_to(ROOT).as_posix()


def find_blocks(page, language: str) -> list[str]:
    """The page's fenced blocks of one language, whatever their indentation."""
    pattern = re.compile(rf"^( *)```{language}\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
    text = page.read_text(encoding="utf-8")
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in pattern.findall(text)]


def find_commands(page) -> list[str]:
    text = page.read_text(encoding="utf-8")
    lines = "\n".join(find_blocks(page, "bash")).replace("\\\n", " ").splitlines()
    lines += re.findall(r"^    ((?:python3?|new-llm|make) .*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.M)
    commands = [part.split(" > ")[0].strip() for line in lines for part in line.split(" #")[0].split("&&")]
    return [command for command in commands if command]


def parse_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a command read its arguments, by its own parser, and do nothing else.

    Raises:
        AssertionError: it does not exist, or does not know its arguments.
    """
    while words and re.fullmatch(r"\w+=\S*", words[0]):
        words = words[1:]
    program, arguments = words[0], words[1:]
    if program in OTHER_PROGRAMS:
        return
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert set(arguments) <= set(targets), f"the Makefile has no {arguments}"
    elif program in ("python", "python3"):
        parse_script(ROOT / arguments[0], arguments[1:], monkeypatch)
    else:
        assert program == "new-llm", f"{program}: unknown; a program of others belongs in OTHER_PROGRAMS"
        parse_own(arguments, monkeypatch)


def parse_own(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`new-llm`: every command reads its flags by its `read`; the harness of lm-eval reads its own."""
    name, *flags = [word for word in arguments if word != "--debug"] or ["--help"]
    if name in ("--help", "--version"):
        return
    assert name in COMMANDS, f"new-llm has no {name}"
    if name == "lm-eval":
        pytest.importorskip("lm_eval")
    try:
        command = load_command(name).read(flags, f"new-llm {name}")
    except SystemExit as stopped:
        if "--help" not in flags or stopped.code:
            raise
    else:
        if name == "lm-eval":
            read_arguments(command.execute, monkeypatch)


def parse_script(script, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python program of this repository: a launcher of a command, or one that reads its own flags."""
    assert script.is_file(), f"{script} does not exist"
    source = script.read_text(encoding="utf-8")
    if launched := re.search(r'launch\("([\w-]+)"\)', source):
        parse_own([launched[1], *arguments], monkeypatch)
    elif "argparse" in source and arguments:
        monkeypatch.setattr(sys, "argv", [str(script), *arguments])
        monkeypatch.syspath_prepend(str(script.parent))
        read_arguments(lambda: runpy.run_path(str(script), run_name="__main__"), monkeypatch)
    else:
        compile(source, str(script), "exec")
        assert not arguments, f"{script.name} takes no arguments"


def read_arguments(run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a program read its arguments, and then exit with them: an exit is what programs let pass."""
    parse = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda *given, **named: sys.exit(parse(*given, **named)))
    with pytest.raises(SystemExit) as stopped:
        run()
    assert isinstance(stopped.value.code, argparse.Namespace)


LANGUAGES = {"", "bash", "python", "yaml", "text"}


@pytest.mark.parametrize("page", [page for page in PAGES if find_blocks(page, "python")], ids=name_page)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(find_blocks(page, "python")), name_page(page), "exec"), {"__name__": "page"})


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


def read_figure(summary, name: str) -> tuple[float, ...]:
    """A study's figure and its interval; differences of models are in nats, and are told as ratios."""
    variant, _, figure = name.partition(": ")
    entry = summary["variants"][variant]
    if figure in entry.get("comparisons", {}):
        return tuple(math.expm1(entry["comparisons"][figure][end] or 0) for end in ("nats", "low", "high"))
    found = tuple(entry["figures"][figure][end] or 0 for end in ("mean", "low", "high"))
    return tuple(map(math.expm1, found)) if figure.startswith("Against ") else found


def test_the_readme_s_numbers_are_those_of_the_committed_results():
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## What we found")[1].split("\n## ")[0]
    sources = (ROOT / "docs/experiments/readme.txt").read_text(encoding="utf-8").split("\n\n")[1].splitlines()
    shown, program = section, runpy.run_path(str(ROOT / "studies" / "compare.py"))
    for said, file, *names in (line.split(" | ") for line in sources):
        assert said in shown
        shown = shown.replace(said, "")
        text = (ROOT / "docs/experiments" / file).read_text(encoding="utf-8")
        if not names:  # results that no study holds
            assert said in text
            continue
        summary = json.loads(text)
        if len(names) == 2:  # two models' losses
            found = program["compare"](*(program["read"](summary, name) for name in names))
            assert found.startswith(said + " ("), (said, found)
            continue
        value, low, high = read_figure(summary, names[0])
        signed = f"{100 * value:+.1f} % [{100 * low:+.1f}, {100 * high:+.1f}]".replace("-", "−")
        plain = signed.partition(" [")[0]
        assert {said} & {format_size(value, low, high), format_size(value, None, None), signed, plain}, (said, signed)
    told = {line.split(" | ")[0] for line in sources}
    assert set(re.findall(r"[−+]?[\d.]+ %", shown)) <= told | {"95 %"}


@functools.cache
def list_flags() -> set[str]:
    return set(re.findall(r"--[\w.-]+", write_completion("bash"))) | {"--debug", "--version"}


@pytest.mark.parametrize("page", [page for page in PAGES if find_blocks(page, "yaml")], ids=name_page)
def test_yaml_blocks_are_configurations(page):
    for block in find_blocks(page, "yaml"):
        assert settings_from_dict(yaml.safe_load(block), ExperimentConfig, name_page(page)).models


def test_every_equation_names_what_implements_it_and_every_row_of_the_audit_a_test():
    rows = re.findall(r"^\| .* \|$", (ROOT / "docs" / "mathematics.md").read_text(encoding="utf-8"), re.MULTILINE)[1:]
    assert len(rows) >= 12
    for row in rows:
        links = re.findall(r"\[`(\w+)`\]\(reference/\w+\.md#(new_llm\.[\w.]+)\)", row.split("|")[-2])
        assert links, row
        for name, path in links:
            assert callable(pkgutil.resolve_name(path))
            assert path.endswith(f".{name}")
    text = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| what ")]
    assert len(rows) >= 15
    for row in rows:
        assert re.search(r"`tests/[\w/]+\.py::test_\w+` \|$", row), row
        for module in re.findall(r"`([a-z_/]+\.py)`", row):
            assert (ROOT / "src" / "new_llm" / module).is_file(), module


@pytest.mark.parametrize("page", [*PAGES, ROOT / "docs/images/life-of-a-batch.svg"], ids=name_page)
def test_what_a_page_names_exists(page):
    text = page.read_text(encoding="utf-8")
    sentences = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    assert set(re.findall(r"`new-llm ([a-z][\w-]*)", sentences)) <= set(COMMANDS)
    assert set(re.findall(r"`(--[\w.-]+)", sentences)) <= list_flags()
    assert set(re.findall(r"^ *```(\w*)", text, re.MULTILINE)) <= LANGUAGES  # of which every block is tested
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", text):
        if "://" in target:
            continue
        found = page if not target else page.parent / target
        assert found.exists(), target
        if anchor and not anchor.startswith("new_llm."):
            headings = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\s-]", "", h).strip().lower().replace(" ", "-") for h in headings], anchor
    for path in re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE) + re.findall(r"[#`](new_llm\.[\w.]+)[)`]", text):
        pkgutil.resolve_name(path)
    for file in re.findall(
        r"(?<![\w/])((?:config|data|models|training|evaluation|experiments|report|cli)/[\w/]+\.py)", text
    ):
        assert (ROOT / "src/new_llm" / file).is_file(), file
    for file, test in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text):
        assert not test or f"\ndef {test}(" in (ROOT / file).read_text(encoding="utf-8"), (file, test)
    for file in re.findall(r"`((?:examples|benchmarks|studies|scripts|configs)/[\w./-]+\.\w+)`", text):
        assert (ROOT / file).is_file(), file


def test_project_files_agree_with_the_project():
    def read(name: str) -> str:
        return (ROOT / name).read_text(encoding="utf-8")

    assert len(read("README.md").splitlines()) <= 120  # three screens
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in PAGES if ROOT / "docs" in page.parents}
    assert pages == set(re.findall(r"([\w/-]+\.md)$", read("mkdocs.yml"), re.MULTILINE))
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


@pytest.mark.skipif(importlib.util.find_spec("zensical") is None, reason="needs the extra docs (make docs)")
def test_the_site_builds_strictly_and_loads_nothing(tmp_path):
    for name in ("docs", "src", "mkdocs.yml"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    assert "Warning" not in run_python("-m", "zensical", "build", "--strict", cwd=tmp_path)
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:link|script|img|iframe)[^>]+(?:src|href)=\"?((?:https?:)?//[^\" >]+)", text)
        assert not loaded, (page.name, loaded)


STUDIES = sorted((ROOT / "studies").glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_committed_study_can_run(path):
    study = read_settings(path, StudyConfig)
    assert study.name == path.stem
    assert study.question.endswith("?")
    assert f"new-llm study studies/{path.name}" in path.read_text()
    for name in study.variants:
        config = study.configure(name, study.seeds[0])
        reads_all = config.data.num_samples is None
        tokens = 0 if reads_all else config.data.num_samples * config.data.seq_length
        first = study.configure(next(iter(study.variants)), 0).data
        if not reads_all and config.data.reversal_pairs == first.reversal_pairs:  # else it trains on another text
            asked = first.num_samples * first.seq_length
            assert tokens < asked if name.endswith("-short") else tokens == asked


def test_a_difference_that_a_page_tells_is_that_of_the_committed_losses():
    program, losses = ROOT / "studies" / "compare.py", ROOT / "docs/experiments/novels/losses.json"
    found = run_python(program, losses, "gated_delta-4-three/caches/+ all", "pythia/caches/+ all")
    said, _, seeds = found.strip().rpartition(" ")
    assert said in (ROOT / "docs/experiments/novels.md").read_text(encoding="utf-8")
    assert seeds == "(5)"
    unknown = [sys.executable, program, losses, "rwkv/bare"]
    refused = subprocess.run(unknown, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "rwkv/bare: not in the file; allowed are" in refused.stderr
