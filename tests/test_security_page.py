"""The audit names tests that exist."""

import re

import pytest

from documents import ROOT

PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
NAMES = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| what ")]


def test_every_row_names_a_test():
    assert len(ROWS) >= 15
    assert all(re.search(r"`tests/[\w/]+\.py::test_\w+` \|$", row) for row in ROWS)


@pytest.mark.parametrize(("file", "name"), sorted(set(NAMES)))
def test_the_named_test_exists(file, name):
    assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8")


def test_the_named_modules_exist():
    modules = {name for row in ROWS for name in re.findall(r"`([a-z_/]+\.py)`", row)}
    assert modules
    assert [name for name in modules if not (ROOT / "src" / "new_llm" / name).is_file()] == []
