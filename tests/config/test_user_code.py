"""Objects of a user's own module, by name."""

import sys
from pathlib import Path

import pytest

from new_llm.config.errors import UserError
from new_llm.config.loading import load_by_name


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_the_current_directory_is_searched_last(here: Path) -> None:
    (here / "own_measures.py").write_text("VALUE = 7")
    (here / "json.py").write_text("VALUE = 7")
    assert load_by_name("own_measures:VALUE") == 7
    (here / "own_package").mkdir()
    (here / "own_package" / "deep.py").write_text("VALUE = 8")
    assert load_by_name("own_package.deep:VALUE") == 8
    with pytest.raises(UserError, match=r"json:VALUE: .*json/__init__\.py defines no VALUE"):
        load_by_name("json:VALUE")


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        ("", "absent_module:Layer", "no module named absent_module, neither installed nor in "),
        ("", "own_module:Layer", r"own_module\.py defines no Layer"),
        ("import absent_module", "own_module:Layer", "importing own_module failed: No module named 'absent_module'"),
        ("1 / 0", "own_module:Layer", "importing own_module failed: ZeroDivisionError: division by zero"),
        ("class", "own_module:Layer", "importing own_module failed: SyntaxError: invalid syntax"),
        ("", "own_module", "a layer of your own is named my_module:MyName"),
        ("", "own-module:Layer", "a layer of your own is named my_module:MyName"),
        ("", "own_module:", "a layer of your own is named my_module:MyName"),
    ],
)
def test_what_can_not_be_loaded_is_one_line(here: Path, source: str, name: str, message: str) -> None:
    (here / "own_module.py").write_text(source)
    with pytest.raises(UserError, match=message) as caught:
        load_by_name(name, "a layer")
    assert "\n" not in str(caught.value)
