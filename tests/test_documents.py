"""What README and docs show is run as it stands there."""

import re
import shlex
from pathlib import Path

import pytest

from new_llm.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "CONTRIBUTING.md"]


def find_blocks(language: str) -> list[tuple[str, str]]:
    pattern = re.compile(rf"^```{language}\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [(page.name, block) for page in PAGES for block in pattern.findall(page.read_text(encoding="utf-8"))]


def find_commands() -> list[str]:
    lines = [line.split(" #")[0].strip() for _, block in find_blocks("bash") for line in block.splitlines()]
    return sorted({line for line in lines if line})


@pytest.mark.parametrize(("page", "code"), find_blocks("python"), ids=lambda value: value[:24])
def test_python_blocks_run(page: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, page, "exec"), {})


@pytest.mark.parametrize("command", find_commands())
def test_commands_exist_and_take_their_flags(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from new_llm.cli.experiment import parse_arguments

    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets)
        return
    if words[0] == "python3":
        script = ROOT / words[1]
        assert script.exists()
        words = ["new-llm", script.stem.replace("_", "-"), *words[2:]]
    assert words[0] in ("new-llm", "python")
    if words[0] == "new-llm":
        assert words[1] in COMMANDS
    if words[1] == "experiment" and "--resume" not in words:
        assert parse_arguments(words[2:]).experiment.models


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


def test_readme_fits_three_screens() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120
