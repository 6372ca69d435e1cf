"""The command under a launcher, as a user types it."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from new_llm.cli.main import check_command, main
from new_llm.config import UserError
from new_llm.experiments.run_folder import read_json
from tiny import ENVIRONMENT, make_settings, wait_until
from training_cases import read_curve

SEVERAL = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def start(folder: Path, *flags: str, launcher: Sequence[str] = (), **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, *launcher, "-m", "new_llm.cli.main", "experiment", "--runs-dir", str(folder), *flags]
    return subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=ENVIRONMENT | environment)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, list[str]]:
    """Exit code, standard output, and the command's own lines of the standard error."""
    out, err = process.communicate(timeout=120)
    return process.returncode, out, [line for line in err.splitlines() if line.startswith("new-llm: ")]


@pytest.fixture(scope="module")
def flags(addresses: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    settings = make_settings(addresses, Path("runs")) | {"models": ["infini"]}
    settings["data"] |= {"num_samples": 60}
    settings["train"] |= {"num_epochs": 40, "patience": 0, "log_every_steps": 1}
    path = tmp_path_factory.mktemp("settings") / "settings.yaml"
    path.write_text(yaml.safe_dump(settings))
    return ["--config", str(path)]


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_sigterm_to_the_launcher_saves_and_one_process_goes_on(tmp_path, flags, sharding):
    assert finish(start(tmp_path, "--name", "whole", *flags))[0] == 0
    process = start(tmp_path, "--name", "both", *flags, "--train.sharding", sharding, launcher=SEVERAL)
    metrics = tmp_path / "both" / "infini" / "metrics.jsonl"
    assert wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 5, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert out == ""
    assert err.count("interrupted at step") == 1
    assert err.count("continue with: new-llm experiment") == 1
    assert read_json(tmp_path / "both" / "results.json") is None
    assert finish(start(tmp_path, "--name", "both", "--resume", "--train.sharding", "ddp"))[0] == 0
    expected = read_curve(tmp_path / "whole" / "infini")
    assert read_curve(tmp_path / "both" / "infini") == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (("--batch-size", "5"), "5 rows can't be divided among 2 processes"),
        (("--data.source", "nowhere"), "nowhere: no such file or folder"),
    ],
)
def test_bad_input_is_one_line_of_one_process(tmp_path, flags, bad, message):
    # Without torchrun's own words: each process as `srun` would start it.
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000)}
    given = ["--name", "bad", *flags, *bad]
    processes = [start(tmp_path / "runs", *given, **environment, RANK=str(rank)) for rank in range(2)]
    ended = [finish(process) for process in processes]
    assert [(code, out) for code, out, _ in ended] == [(2, "")] * 2
    (line,) = [line for _, _, said in ended for line in said]
    assert message in line
    assert not (tmp_path / "runs").exists()


def test_commands_of_one_process_refuse_several(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    assert main(["runs"]) == 2
    assert "runs runs in one process, not in 4; in several run experiment" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr("new_llm.cli.main.QUIET_SECONDS", 0.0)
    assert main(["runs"]) == 2
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match="not a number of processes"):
        check_command("experiment")
