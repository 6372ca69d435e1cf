"""One process in a run folder, and a start that leaves nothing half made."""

import dataclasses
import os
from pathlib import Path

import pytest

from new_llm.config import UserError
from new_llm.experiments.config import ExperimentConfig
from new_llm.experiments.run_folder import create_run, hold_run


@pytest.fixture
def config(tmp_path: Path) -> ExperimentConfig:
    return ExperimentConfig(name="a", runs_dir=str(tmp_path / "deep" / "runs"))


def test_a_link_to_a_run_is_the_same_run(config, tmp_path):
    with hold_run(config, resume=False) as (_, folder):
        create_run(config, folder)
    (tmp_path / "folder-link").symlink_to(folder.parent)
    (folder.parent / "run-link").symlink_to(folder)
    with hold_run(config, resume=True):
        for changes in ({"runs_dir": tmp_path / "folder-link"}, {"name": "run-link"}):
            linked = dataclasses.replace(config, **changes)
            with pytest.raises(UserError, match=rf"\(PID {os.getpid()} on "), hold_run(linked, resume=True):
                pytest.fail("it is held twice")


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
