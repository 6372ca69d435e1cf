"""A real experiment that is killed, or whose disk fills up: started as a user starts it, compared by its end."""

import glob
import json
import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from new_llm.config.files import check_manifest
from new_llm.experiments.run_folder import LOCK_FILE
from new_llm.models import load_model
from new_llm.training.checkpoint import CHECKPOINTS_FOLDER, list_checkpoints
from new_llm.training.log import METRICS_FILE, read_metrics
from tiny import COMMAND, ENVIRONMENT, WAIT_SECONDS, make_settings, wait_until

MODELS = ("infini", "multi_memory")
CLOCK = {"seconds", "cpu_seconds", "tokens_per_second", "peak_memory_bytes", "created", "command", "name", "runs_dir",
         "code"}  # fmt: skip
"""What may differ between two runs of one experiment."""
NUM_EPOCHS = 3
MEASURES = ["sliding", "streaming", "positions", "memory_usage"]


@dataclass
class FaultRun:
    """One run of some seconds that is started again and again, and saves a checkpoint every five steps."""

    folder: Path

    def start(self) -> subprocess.Popen[str]:
        arguments = ["--name", self.folder.name, "--runs-dir", str(self.folder.parent)]
        if (self.folder / "config.yaml").exists():
            arguments.append("--resume")
        else:
            path = self.folder.parent.parent / "settings.yaml"
            settings = make_settings(Path("sotu"), path.parent) | {"models": list(MODELS)}
            settings["data"] |= {"num_samples": 200, "seq_length": 64, "segments_per_sample": 4, "order": "stream"}
            settings["train"] |= {"num_epochs": NUM_EPOCHS, "patience": 0, "log_every_steps": 1}
            settings["train"]["checkpoint_every_steps"] = 5
            settings["eval"] = {"context": 64, "stride": 32, "max_tokens": 1500, "measures": MEASURES}
            path.write_text(yaml.safe_dump(settings), encoding="utf-8")
            arguments += ["--config", str(path)]
        with self.said.open("w") as said:
            command = [*COMMAND, "experiment", *arguments]
            return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=said, text=True)

    @property
    def said(self) -> Path:
        return self.folder.parent.parent / "said.txt"

    def finish(self) -> None:
        process = self.start()
        assert process.wait(WAIT_SECONDS) == 0, self.said.read_text()

    def count_lines(self) -> int:
        return sum(len(read_metrics(self.folder / model)) for model in MODELS)

    def is_writing_checkpoint(self) -> bool:
        return self._has_checkpoint(".step-*")

    def is_measuring(self) -> bool:
        return self._has_checkpoint(f"step-*-epoch-{NUM_EPOCHS:04d}")

    def _has_checkpoint(self, pattern: str) -> bool:
        return bool(glob.glob(str(self.folder / "*" / CHECKPOINTS_FOLDER / pattern)))

    def find_faults(self) -> list[str]:
        found = [path for model in MODELS for path in list_checkpoints(self.folder / model)]
        return [f"{path}: {fault}" for path in found for fault in check_manifest(path)]


def choose_instant(run: FaultRun, process: subprocess.Popen[str], aim: str, dice: random.Random) -> None:
    before = run.count_lines()
    if aim == "start":
        # On a machine that starts fast it is at the first step: the run must not come to its end.
        latest = time.monotonic() + dice.uniform(0.05, 4.0)
        wait_until(lambda: time.monotonic() >= latest or run.count_lines() != before, process)
    elif aim == "training":
        # A resumed process first rewrites the file, so its length is counted from when it grows.
        steps = dice.randint(1, 12)
        wait_until(lambda: run.count_lines() < before or run.count_lines() >= before + steps, process)
        wait_until(lambda: run.count_lines() >= before, process)
        time.sleep(dice.uniform(0, 0.05))
    elif aim == "checkpoint":
        for _ in range(dice.randint(1, 3)):
            wait_until(lambda: not run.is_writing_checkpoint(), process)
            wait_until(run.is_writing_checkpoint, process)
        time.sleep(dice.choice([0, dice.uniform(0, 0.02)]))
    elif aim == "measurement":
        wait_until(lambda: run.is_measuring() and "run folder" in run.said.read_text(), process)
        time.sleep(dice.uniform(0, 0.15))  # it takes a quarter of a second at least


def kill_often(run: FaultRun, aims: list[str], signals: list[signal.Signals], dice: random.Random):
    """Start the run and end it by a signal, once for every aim; gives aim, signal, exit code and stderr."""
    for number, aim in enumerate(aims):
        process, sent = run.start(), signals[number % len(signals)]
        choose_instant(run, process, aim, dice)
        has_ended = process.poll() is not None
        process.send_signal(sent)
        process.wait(WAIT_SECONDS)
        err = run.said.read_text()
        assert not has_ended, f"it ended before fault {number} ({aim}) with {process.returncode}: {err[-2000:]}"
        yield aim, sent, process.returncode, err


def drop_clock(value):
    if isinstance(value, dict):
        return {key: drop_clock(entry) for key, entry in value.items() if key not in CLOCK}
    return [drop_clock(entry) for entry in value] if isinstance(value, list) else value


def assert_same_end(found: FaultRun, expected: FaultRun) -> None:
    """Weights, metrics, results: bit for bit those of the run that nothing has happened to; nothing else is left."""
    for model in MODELS:
        one, two = (run.folder / model for run in (found, expected))
        lines, whole = (drop_clock(read_metrics(folder)) for folder in (one, two))
        assert lines == whole
        assert (one / METRICS_FILE).read_bytes().count(b"\n") == len(whole) == 3 * (200 // 4 + 1)
        weights, others = (load_model(folder / "best").state_dict() for folder in (one, two))
        torch.testing.assert_close(weights, others, rtol=0, atol=0)
        assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    results, others = (json.loads((run.folder / "results.json").read_text()) for run in (found, expected))
    assert results["status"] == "complete"
    assert drop_clock(results) == drop_clock(others)
    assert [path.name for path in found.folder.rglob(".*")] == [LOCK_FILE]
    assert not list(found.folder.parent.glob(f".{found.folder.name}*"))


SEED = int(os.environ.get("NEW_LLM_FAULT_SEED", "0"))
"""Of the instants; another one tries others."""


@pytest.fixture
def dice() -> random.Random:
    print(f"instants of NEW_LLM_FAULT_SEED={SEED}")
    return random.Random(SEED)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> FaultRun:
    run = FaultRun(tmp_path_factory.mktemp("whole") / "runs" / "whole")
    run.finish()
    return run


def order_aims(aims: list[str], dice: random.Random) -> list[str]:
    """In random order, and three more: while the first model is measured, while the second is, and at once again."""
    mixed = dice.sample(aims, len(aims))
    half = len(mixed) // 2
    return [*mixed[:half], "measurement", *mixed[half:], "measurement", "measurement"]


@pytest.mark.slow
def test_25_sigkills_at_random_instants_change_nothing(whole, tmp_path, dice, capsys):
    killed = FaultRun(tmp_path / "runs" / "killed")
    aims = order_aims(["start"] * 3 + ["checkpoint"] * 9 + ["training"] * 10, dice)
    num_torn = 0
    for number, (aim, _, code, err) in enumerate(kill_often(killed, aims, [signal.SIGKILL], dice)):
        assert code == -signal.SIGKILL, err
        assert killed.find_faults() == [], (number, aim)
        num_torn += killed.is_writing_checkpoint()
    killed.finish()
    assert_same_end(killed, whole)
    with capsys.disabled():
        print(f" [{len(aims)} kills, {num_torn} in the middle of a checkpoint]", end="")
    assert num_torn >= 3


@pytest.mark.slow
def test_sigterm_and_ctrl_c_at_random_instants_end_cleanly_and_change_nothing(whole, tmp_path, dice):
    killed = FaultRun(tmp_path / "runs" / "killed")
    aims = order_aims(["start"] + ["checkpoint"] * 2 + ["training"] * 3, dice)
    for aim, sent, code, err in kill_often(killed, aims, [signal.SIGTERM, signal.SIGINT], dice):
        # In a process's first instants Python has not begun the program yet, and nothing is said.
        assert code == 130 or (not err.strip() and code == -sent) or aim == "start", (aim, code, err)
        assert not killed.is_writing_checkpoint(), aim
        assert killed.find_faults() == [], aim
        if code == 130:
            assert "Traceback" not in err, err
            last = err.strip().splitlines()[-1]
            assert "--resume" in last or last == "new-llm: interrupted", err
    killed.finish()
    assert_same_end(killed, whole)


@pytest.fixture
def small_disk(tmp_path: Path):
    """A small tmpfs, where this process may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_up_ends_the_run_in_one_line_and_changes_nothing(whole, small_disk, dice):
    run = FaultRun(small_disk / "runs" / "full")
    for number in range(6):
        process = run.start()
        choose_instant(run, process, "training" if number % 2 else "checkpoint", dice)
        with (ballast := small_disk / "ballast").open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(b"\0" * 65536)
        os.truncate(ballast, max(0, ballast.stat().st_size - dice.choice([0, 4096, 50_000, 200_000])))
        process.wait(WAIT_SECONDS)
        err = run.said.read_text()
        assert process.returncode == 2, (number, process.returncode, err)
        (said,) = [line for line in err.splitlines() if line.startswith("new-llm: ")]
        assert f"{small_disk}/" in said
        assert "No space left on device: free some space; then continue a run with --resume" in said
        assert "Traceback" not in err, err
        assert err.strip().splitlines()[-1] == said, err
        assert run.find_faults() == []
        ballast.unlink()
    run.finish()
    assert_same_end(run, whole)
