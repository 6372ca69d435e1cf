"""Files are written whole, locked by one process, and listed with their digests."""

import errno
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from disk_faults import stop_everywhere
from new_llm.config import UserError, files


def write_folder(path: Path, text: str) -> None:
    with files.write_folder_atomically(path) as folder:
        (folder / "one").write_text(text)
        (folder / "deep").mkdir()
        (folder / "deep" / "two").write_text(text)


def read(path: Path) -> set[str] | None:
    if path.is_dir():
        return {(path / "one").read_text(), (path / "deep" / "two").read_text()}
    return {path.read_text()} if path.exists() else None


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, text=True)


@pytest.mark.parametrize(
    ("write", "change", "left"),
    [
        (files.write_text_atomically, lambda path: files.write_text_atomically(path, "new"), [{"old"}, {"new"}]),
        # Replacing a folder takes two moves; a machine that dies between them leaves none.
        (write_folder, lambda path: write_folder(path, "new"), [{"old"}, {"new"}, None]),
        (write_folder, files.remove_folder_atomically, [{"old"}, None]),
    ],
    ids=["file", "folder", "removal"],
)
@pytest.mark.parametrize("dies", [False, True])
def test_whatever_fails_there_is_the_old_or_the_new(tmp_path, monkeypatch, write, change, left, dies):
    path = tmp_path / "place" / "name"
    write(path, "old")
    for number in stop_everywhere(lambda: change(path), monkeypatch, dies=dies):
        assert read(path) in left, number
        write(path, "old")
        assert read(path) == {"old"}
        assert list(path.parent.iterdir()) == [path], number
    assert number > 3


WRITE = (
    "import os, sys; from pathlib import Path; from new_llm.config.files import write_atomically\n"
    "with write_atomically(Path(sys.argv[1])) as temporary:\n"
    "    temporary.write_text('half'); print('writing', flush=True); sys.stdin.read()"
)


def test_what_a_killed_writer_leaves_is_removed_by_the_next_and_never_a_living_one_s(tmp_path):
    path = tmp_path / "file"
    writer = start(WRITE, path)
    assert writer.stdout.readline() == "writing\n"
    assert len(list(tmp_path.iterdir())) == 1
    files.write_text_atomically(path, "mine")
    assert files.remove_leftovers(tmp_path) == []
    assert len(list(tmp_path.iterdir())) == 2
    writer.kill()
    writer.communicate()
    files.write_text_atomically(tmp_path / "another", "")
    assert len(list(tmp_path.iterdir())) == 3
    files.write_text_atomically(path, "mine again")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["another", "file"]


def test_only_folders_with_our_ending_are_leftovers(tmp_path):
    for name in (".hidden", "name.tmp", ".name.other", ".name.abc.tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / ".name.file.tmp").write_text("a user's")
    (tmp_path / ".name.link.tmp").symlink_to(tmp_path / ".hidden", target_is_directory=True)
    assert files.remove_leftovers(tmp_path, "other") == []
    assert files.remove_leftovers(tmp_path, "name") == [tmp_path / ".name.abc.tmp"]
    assert files.remove_leftovers(tmp_path) == files.remove_leftovers(tmp_path / "absent") == []
    assert len(list(tmp_path.iterdir())) == 5


def fail(error: BaseException) -> None:
    raise error


RUST = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("write", "way"),
    [
        (lambda path: fail(OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))), "free some space"),
        (lambda path: fail(OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))), "change its permissions"),
        (lambda path: Path("/dev/full").write_text("x"), "free some space"),
        (lambda path: torch.save({"a": torch.zeros(9)}, open("/dev/full", "wb")), "free some space"),  # noqa: SIM115
        (lambda path: fail(RUST), "free some space"),
    ],
)
def test_what_the_disk_refuses_names_the_file_and_what_to_do(tmp_path, write, way):
    path = tmp_path / "file"
    with pytest.raises(OSError, match=str(path)) as caught, files.write_atomically(path) as temporary:
        write(temporary)
    message = files.describe_os_error(caught.value)
    assert message.startswith(f"{path}: ")
    assert way in message
    assert ".tmp" not in message
    for error in (ValueError("x"), OSError(errno.ECONNRESET, "reset"), FileNotFoundError(2, "none", "elsewhere")):
        with pytest.raises(type(error)) as caught, files.name_refusals(tmp_path):
            raise error
        assert caught.value is error  # other errors stay as they are


HOLD = (
    "import sys; from pathlib import Path; from new_llm.config.files import hold_lock\n"
    "with hold_lock(Path(sys.argv[1]), 'runs/a'):\n    print('held', flush=True); sys.stdin.read()"
)


def test_a_killed_holder_leaves_no_lock(tmp_path):
    """A second process is refused with who holds it; who waits is told of it once, and goes on when the holder ends."""
    lines: list[str] = []
    with start(HOLD, tmp_path / "lock") as holder:
        assert holder.stdout.readline() == "held\n"
        who = f"another process (PID {holder.pid} on {socket.gethostname()!r}, since 2"
        with pytest.raises(UserError, match=re.escape(f"runs/a: {who}")), files.hold_lock(tmp_path / "lock", "runs/a"):
            pytest.fail("both hold it")
        threading.Timer(0.2, holder.kill).start()
        with files.hold_lock(tmp_path / "lock", "the token cache", on_wait=lines.append):
            assert files.describe_holder(tmp_path / "lock").startswith(f"another process (PID {os.getpid()} ")
    (line,) = lines
    assert line.startswith(f"waiting for another process (PID {holder.pid} on ")
    assert line.endswith("is using the token cache")


def test_a_lock_that_can_t_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for path in (tmp_path / "file" / "lock", tmp_path / "link"):
        with pytest.raises(UserError, match="can't make the lock"), files.hold_lock(path, "x"):
            pytest.fail("it is made")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (None, "manifest.json is missing"),
        (b"", "manifest.json can't be read"),
        (b"[]", "manifest.json can't be read"),
        (b"[" * 100_000, "manifest.json can't be read"),
        (b'{"files": {"weights": {"num_bytes": 5120}}}', "manifest.json can't be read"),
        (b'{"files": {"a\\u0000b": {"num_bytes": 1, "sha256": ""}}}', "manifest.json can't be read"),
        (b'{"files": {"/dev/zero": {"num_bytes": 0, "sha256": ""}}}', "/dev/zero is not a regular file"),
    ],
)
def test_a_damaged_manifest_is_itself_a_fault(tmp_path, content, fault):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "weights").write_bytes(bytes(5120))
    files.write_manifest(tmp_path)
    assert files.check_manifest(tmp_path) == []
    (path := tmp_path / files.MANIFEST_FILE).unlink()
    if content is not None:
        path.write_bytes(content)
    assert files.check_manifest(tmp_path) == [fault]
