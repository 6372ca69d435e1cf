"""One process at a time, and no lock that outlives its holder."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from new_llm.config import UserError
from new_llm.config.files import describe_holder, hold_lock

HOLD = (
    "import sys; from pathlib import Path; from new_llm.config.files import hold_lock\n"
    "with hold_lock(Path(sys.argv[1]), 'runs/a'):\n    print('held', flush=True); sys.stdin.read()"
)
COUNT = (
    "import sys, time; from pathlib import Path; from new_llm.config import files as locks\n"
    "folder = Path(sys.argv[1])\n"
    "for _ in range(int(sys.argv[2])):\n"
    "    with locks.hold_lock(folder / 'lock', 'x', on_wait=lambda line: None):\n"
    "        number = int((folder / 'number').read_text()); time.sleep(0.0005)\n"
    "        (folder / 'number').write_text(str(number + 1))"
)


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def holder(tmp_path: Path):
    process = start(HOLD, tmp_path / "lock")
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


def test_the_second_is_refused_with_who_holds_it(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(UserError) as error, hold_lock(tmp_path / "lock", "runs/a"):
        pytest.fail("both hold it")
    message = str(error.value)
    assert message.startswith(f"runs/a: another process (PID {holder.pid} on {socket.gethostname()!r}, since 2")
    assert "\n" not in message
    assert (tmp_path / "lock").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_holder_leaves_no_lock(tmp_path: Path, holder: subprocess.Popen[str], number: int) -> None:
    os.kill(holder.pid, number)
    holder.wait()
    with hold_lock(tmp_path / "lock", "runs/a"):
        assert describe_holder(tmp_path / "lock").startswith(f"another process (PID {os.getpid()} ")


def test_who_waits_is_told_once_and_goes_on_when_the_holder_ends(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    lines: list[str] = []
    began = time.monotonic()
    threading.Timer(0.2, holder.kill).start()
    with hold_lock(tmp_path / "lock", "the token cache", on_wait=lines.append):
        assert time.monotonic() - began > 0.15
    assert len(lines) == 1
    assert lines[0].startswith(f"waiting for another process (PID {holder.pid} on ")
    assert lines[0].endswith("is using the token cache")


def test_no_two_processes_are_ever_inside_at_once(tmp_path: Path) -> None:
    (tmp_path / "number").write_text("0")
    counters = [start(COUNT, tmp_path, 60) for _ in range(3)]
    for counter in counters:
        assert counter.communicate()[1] == ""
    assert (tmp_path / "number").read_text() == "180"


def test_a_lock_that_can_t_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="can't make the lock"), hold_lock(tmp_path / "file" / "lock", "x"):
        pass
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="can't make the lock"), hold_lock(tmp_path / "link", "x"):
        pass
    assert not (tmp_path / "elsewhere").exists()
