"""Torn, changed and missing files of a folder are named."""

import json
from pathlib import Path

import pytest

from new_llm.config.files import (
    MANIFEST_FILE,
    check_manifest,
    describe_files,
    write_manifest,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deep").mkdir()
    (tmp_path / "weights").write_bytes(bytes(range(256)) * 20)
    (tmp_path / "deep" / "state").write_bytes(b"{}")
    (tmp_path / "empty").touch()
    write_manifest(tmp_path)
    return tmp_path


def test_a_whole_folder_has_no_faults(folder: Path) -> None:
    assert check_manifest(folder) == []
    files = json.loads((folder / MANIFEST_FILE).read_text())["files"]
    assert set(files) == {"weights", "deep/state", "empty"}
    assert files["deep/state"] == {
        "num_bytes": 2,
        "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
    }
    assert describe_files(folder) == files


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (None, "manifest.json is missing"),
        (b"", "manifest.json can't be read"),
        (b"\xff\xfe", "manifest.json can't be read"),
        (b"[]", "manifest.json can't be read"),
        (b"{}", "manifest.json can't be read"),
        (b"[" * 100_000, "manifest.json can't be read"),
        (b'{"files": 3}', "manifest.json can't be read"),
        (b'{"files": {"weights": {"num_bytes": 5120}}}', "manifest.json can't be read"),
        (b'{"files": {"a\\u0000b": {"num_bytes": 1, "sha256": ""}}}', "manifest.json can't be read"),
        (b'{"files": {"/dev/zero": {"num_bytes": 0, "sha256": ""}}}', "/dev/zero is no file"),
    ],
)
def test_a_damaged_manifest_is_itself_a_fault(folder: Path, content: bytes | None, fault: str) -> None:
    path = folder / MANIFEST_FILE
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert check_manifest(folder) == [fault]
