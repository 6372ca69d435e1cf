"""What processes say to one another: values, errors, the wish to stop; and what is left when they end."""

import atexit
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import yaml

from new_llm.cli.main import check_command, main
from new_llm.config import UserError
from new_llm.config.errors import OtherProcessError
from new_llm.experiments.run_folder import read_json
from new_llm.processes import ALONE, Processes, _end_processes, start_processes
from new_llm.training import Trainer, TrainingError
from new_llm.training.checkpoint import share_weights
from new_llm.training.log import read_metrics
from tiny import ENVIRONMENT, make_settings, wait_until
from training_cases import make_trainer, read_curve, run_processes


def talk(processes: Processes) -> None:
    rank, count = processes.rank, processes.count
    assert start_processes() is processes
    assert processes.gather(rank * 10) == [0, 10, 20]
    assert processes.share(f"from {rank}") == "from 0"
    assert processes.run_on_main(lambda: os.environ["RANK"]) == "0"
    assert processes.sum(np.array([rank, 0.25])).tolist() == [3, 0.75]
    assert processes.slice_rows(6) == slice(2 * rank, 2 * rank + 2)
    with pytest.raises(UserError, match=r"train\.batch_size: 7 rows can't be divided among 3 processes"):
        processes.slice_rows(7)
    model = torch.nn.Linear(2, 3)
    torch.nn.init.constant_(model.weight, rank)
    share_weights(model.state_dict() if rank == 0 else {}, model, processes)
    assert model.weight.tolist() == [[0.0] * 2] * 3

    order: list[float] = []
    began = processes.run_main_first(lambda: order.append(time.monotonic()) or time.sleep(0.1) or order[0])
    assert min(processes.gather(began)[1:]) >= processes.gather(began)[0] + 0.1

    # An error of one is an error of all, and one of them has the words.
    for error, is_user_error in ((UserError("bad input"), True), (OSError("no disk"), True), (KeyError("bug"), False)):
        work = Mock(side_effect=error if rank == 1 else None)
        with pytest.raises((type(error), OtherProcessError)) as caught, processes.agree():
            work()
        assert (type(caught.value) is type(error)) == (rank == 1)
        assert str(caught.value).endswith(str(error))
        assert rank == 1 or caught.value.is_user_error == is_user_error
    with pytest.raises((UserError, OtherProcessError)) as caught, processes.agree():
        raise UserError(f"process {rank} too")
    assert isinstance(caught.value, UserError) == (rank == 0)

    assert [processes.any(rank == wished) for wished in (0, count - 1, count)] == [True, True, False]


def test_processes_agree():
    run_processes(3, talk)


def test_a_launcher_that_is_not_understood_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="RANK, MASTER_ADDR, MASTER_PORT is not set"):
        start_processes()
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match=r"train\.sharding"):
        start_processes()


def count_gloo_threads() -> int:
    return sum(name.read_text() == "pt_gloo_runloop\n" for name in Path("/proc/self/task").glob("*/comm"))


def train_and_count(processes: Processes, folder: Path) -> None:
    make_trainer(folder, processes=processes, num_epochs=1, batch_size=6).run()
    rank = processes.rank  # the handler must not hold the processes themselves

    def end() -> None:
        before = count_gloo_threads()
        _end_processes()
        (folder / f"threads-{rank}").write_text(f"{before > 0} {count_gloo_threads()}")

    atexit.unregister(_end_processes)
    atexit.register(end)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the names of threads in /proc")
def test_no_thread_of_a_group_outlives_the_leave(tmp_path):
    """A thread that drops its last tensor while Python ends aborts the process after a finished training."""
    run_processes(2, train_and_count, tmp_path, start_method="spawn")
    for rank in range(2):
        assert (tmp_path / f"threads-{rank}").read_text() == "True 0"


def poison(trainer: Trainer, step: int) -> None:
    """Make the last row's loss of a step's batches NaN: it is read by one process alone."""
    forward = trainer._forward
    is_last = trainer.processes.rank + 1 == trainer.processes.count

    def compute(batch) -> torch.Tensor:
        return forward(batch) * (float("nan") if trainer.state.step + 1 == step and is_last else 1.0)

    trainer._forward = compute


def train(processes: Processes, root: Path) -> None:
    for way in ("ddp", "fsdp"):
        changes = {"processes": processes, "sharding": way, "batch_size": 6, "learning_rate": 1e-2}
        trainer = make_trainer(root / way, on_nonfinite="skip", **changes)
        poison(trainer, 3)
        trainer.run()
        trainer = make_trainer(root / f"{way}-stopped", **changes)
        poison(trainer, 3)
        with pytest.raises(TrainingError, match="loss is nan at step 3"):
            trainer.run()


@pytest.mark.slow
def test_a_fault_in_one_process_is_skipped_or_stops_all(tmp_path):
    train(ALONE, tmp_path / "one")
    run_processes(2, train, tmp_path / "two")
    for way in ("ddp", "fsdp"):
        expected = read_curve(tmp_path / "one" / way)
        assert len(expected) > 20
        assert read_curve(tmp_path / "two" / way) == pytest.approx(expected, rel=1e-4)
        one, two = ([line["event"] for line in read_metrics(tmp_path / count / way)] for count in ("one", "two"))
        assert one == two


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
    assert "runs runs in one process, not in 4; only experiment, " in capsys.readouterr().err
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr("new_llm.cli.main.QUIET_SECONDS", 0.0)
    assert main(["runs"]) == 2
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match="not a number of processes"):
        check_command("experiment")
