"""A disk that fills up under a run, again and again: one line, a whole last checkpoint, and the same end."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_runs import FaultRun, assert_same_end, choose_instant

SIZE = "24m"
NUM_FILLS = 6


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A small tmpfs, where this process may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(place: Path, spare_bytes: int) -> Path:
    """Take the disk's space but for a few bytes."""
    ballast = place / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 65536)
        except OSError:
            pass
        size = file.tell()
    os.truncate(ballast, max(0, size - spare_bytes))
    return ballast


@pytest.mark.slow
def test_a_disk_that_fills_up_ends_the_run_in_one_line_and_changes_nothing(whole, small_disk, dice):
    run = FaultRun(small_disk, "full")
    for number in range(NUM_FILLS):
        process = run.start()
        choose_instant(run, process, "training" if number % 2 else "checkpoint", dice)
        ballast = fill(small_disk, dice.choice([0, 4096, 50_000, 200_000]))
        _, err = process.communicate(timeout=240)
        assert process.returncode == 2, (number, process.returncode, err)
        said = [line for line in err.splitlines() if line.startswith("new-llm: ")]
        assert len(said) == 1, err
        assert f"{small_disk}/" in said[0]
        assert "No space left on device: free some space; a run then continues by --resume" in said[0]
        assert "Traceback" not in err, err
        assert err.strip().splitlines()[-1] == said[0], err
        assert run.find_faults() == []
        ballast.unlink()
    run.finish()
    assert_same_end(run, whole)


@pytest.mark.slow
def test_a_disk_that_is_full_from_the_start_is_one_line(small_disk):
    run = FaultRun(small_disk, "full")
    ballast = fill(small_disk, 0)
    process = run.start()
    _, err = process.communicate(timeout=240)
    assert process.returncode == 2
    assert err.splitlines()[-1].startswith("new-llm: "), err
    assert "No space left on device" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert list(small_disk.iterdir()) == [ballast]
