"""One process in a run folder, and a start that leaves nothing half made."""

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from new_llm.config import UserError
from new_llm.experiments.config import ExperimentConfig
from new_llm.experiments.run_folder import create_run, hold_run

HOLD = (
    "import sys; from new_llm.experiments.config import ExperimentConfig\n"
    "from new_llm.experiments.run_folder import hold_run\n"
    "with hold_run(ExperimentConfig(name='a', runs_dir=sys.argv[1]), resume=bool(sys.argv[2])):\n"
    "    print('held', flush=True); sys.stdin.read()"
)


@contextmanager
def hold_elsewhere(config: ExperimentConfig, *, resume: bool = False) -> Iterator[int]:
    """Inside the block another process holds the run; gives its PID."""
    command = [sys.executable, "-c", HOLD, str(config.runs_dir), "resume" if resume else ""]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        yield other.pid
        other.kill()


@pytest.fixture
def config(tmp_path: Path) -> ExperimentConfig:
    return ExperimentConfig(name="a", runs_dir=str(tmp_path / "deep" / "runs"))


def test_a_link_to_a_run_is_the_same_run(config, tmp_path):
    with hold_run(config, resume=False) as (_, folder):
        create_run(config, folder)
    (tmp_path / "folder-link").symlink_to(folder.parent)
    (folder.parent / "run-link").symlink_to(folder)
    with hold_elsewhere(config, resume=True) as pid:
        for changes in ({"runs_dir": tmp_path / "folder-link"}, {"name": "run-link"}):
            linked = dataclasses.replace(config, **changes)
            with pytest.raises(UserError, match=rf"\(PID {pid} on "), hold_run(linked, resume=True):
                pytest.fail("both are in it")


def test_leftovers_of_a_killed_process_go_when_the_run_goes_on(config):
    with hold_run(config, resume=False) as (_, folder):
        create_run(config, folder)
    left = [folder / ".results.json.abc.tmp", folder / "infini" / "best" / ".model.safetensors.abc.tmp"]
    for place in left:
        place.mkdir(parents=True)
        (place / "half").touch()
    kept = folder / "infini" / "metrics.jsonl"
    kept.touch()
    with hold_run(config, resume=True):
        assert not any(place.exists() for place in left)
    assert kept.exists()
