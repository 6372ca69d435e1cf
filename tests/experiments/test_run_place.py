"""One process in a run folder, and a start that leaves nothing half made."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from new_llm.config import UserError
from new_llm.experiments.config import ExperimentConfig
from new_llm.experiments.run_place import create_run, hold_run

HOLD = (
    "import sys; from new_llm.experiments.config import ExperimentConfig\n"
    "from new_llm.experiments.run_place import hold_run\n"
    "with hold_run(ExperimentConfig(name='a', runs_dir=sys.argv[1]), resume=False):\n"
    "    print('held', flush=True); sys.stdin.read()"
)


@pytest.fixture
def config(tmp_path: Path) -> ExperimentConfig:
    return ExperimentConfig(name="a", runs_dir=str(tmp_path / "deep" / "runs"))


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_process_is_refused_at_once_and_told_who_is_there(config: ExperimentConfig, resume: bool) -> None:
    command = [sys.executable, "-c", HOLD, str(config.runs_dir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(UserError, match=rf"runs/a: process {other.pid} on '.*' since .* is at work on it"),
            hold_run(config, resume=resume),
        ):
            pytest.fail("both are in it")
        other.kill()
        other.wait()
        with hold_run(config, resume=False) as (_, folder):
            create_run(config, folder)
    with hold_run(config, resume=True):
        pass
    assert os.listdir(config.runs_dir) == ["a"]


def test_bad_input_leaves_no_folder_behind(config: ExperimentConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run here"), hold_run(config, resume=True):
        pass
    with pytest.raises(UserError, match="bad data"), hold_run(config, resume=False):
        raise UserError("bad data")
    assert list(tmp_path.iterdir()) == []


def test_a_run_folder_has_its_configuration_from_the_start(
    config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    class DiedError(Exception):
        pass

    def die(*args: object) -> None:
        raise DiedError

    with hold_run(config, resume=False) as (_, folder):
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", die)
            with pytest.raises(DiedError):
                create_run(config, folder)
        assert not folder.exists()
        create_run(config, folder)
        assert os.listdir(folder) == ["config.yaml"]
        with pytest.raises(UserError, match="made meanwhile"):
            create_run(config, folder)


def test_leftovers_of_a_killed_process_go_when_the_run_goes_on(config: ExperimentConfig) -> None:
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
