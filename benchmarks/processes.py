"""Compare the learning curves of one process, several with all weights (DDP), and several with shards (FSDP).

    python benchmarks/processes.py [--models infini ...] [--processes 2] [--quick] [flags of `new-llm experiment`]

Every training is `new-llm experiment` as a user would start it, alone or under torchrun, with the same global batch.
Then each kind of training is stopped by SIGTERM in the middle and resumed as each other kind. Exits with code 1 if a
loss differs by more than `--tolerance` from that of one process.
"""

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ALONE = "1 process"
SHOWN_STEPS = 12
SETTINGS = [
    *(
        "--data.source",
        "sotu",
        "--data.tokenizer-vocab-size",
        "1024",
        "--data.no-reversal-pairs",
        "--eval.measures",
        "sliding",
        "streaming",
    ),
    *("--model.hidden-size", "64", "--model.num-hidden-layers", "2", "--model.num-attention-heads", "2"),
    *("--model.intermediate-size", "256", "--data.seq-length", "128", "--data.segments-per-sample", "4"),
    *("--samples", "240", "--batch-size", "4", "--epochs", "2", "--lr", "2e-3", "--train.patience", "0"),
    *("--eval.max-tokens", "4000", "--eval.context", "128", "--eval.stride", "64"),
]
QUICK = ["--samples", "60", "--model.hidden-size", "32", "--eval.max-tokens", "500"]
FORCED = ["--device", "cpu", "--train.precision", "fp32", "--train.log-every-steps", "1"]


class Ways:
    """Trainings in a folder: one process, DDP or FSDP."""

    def __init__(self, folder: Path, flags: list[str], num_processes: int) -> None:
        self.folder = folder
        self.flags = flags
        several = ["--standalone", "--nproc_per_node", str(num_processes)]
        launcher = [sys.executable, "-m", "torch.distributed.run", *several]
        self.commands = {
            ALONE: [sys.executable],
            f"{num_processes}, DDP": launcher,
            f"{num_processes}, FSDP": launcher,
        }

    def start(self, way: str, model: str, name: str, *, resume: bool) -> subprocess.Popen[str]:
        sharding = "fsdp" if way.endswith("FSDP") else "ddp"
        command = [*self.commands[way], "-m", "new_llm.cli.main", "experiment", "--runs-dir", str(self.folder)]
        command += ["--name", name, "--train.sharding", sharding]
        command += ["--resume"] if resume else [*self.flags, *FORCED, "--models", model]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)

    def run(self, way: str, model: str, name: str, *, resume: bool = False) -> dict[str, Any]:
        process = self.start(way, model, name, resume=resume)
        said, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"{way} of {model} failed:\n{said[-3000:]}")
        return json.loads((self.folder / name / model / "result.json").read_text())

    def stop(self, way: str, model: str, name: str, step: int) -> int:
        """Start a training and stop it by SIGTERM after some step; returns the step of its checkpoint."""
        process = self.start(way, model, name, resume=False)
        metrics = self.folder / name / model / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) >= step):
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate()
        if "interrupted at step" not in said and not (self.folder / name / model / "result.json").exists():
            raise SystemExit(f"{way} of {model} failed before it could be stopped:\n{said[-3000:]}")
        if (self.folder / name / model / "result.json").exists():
            raise SystemExit(f"{way} of {model} was done before it could be stopped: train longer (--epochs)")
        newest = max((self.folder / name / model / "checkpoints").iterdir())
        return json.loads((newest / "state.json").read_text())["step"]


def read_losses(result: dict[str, Any]) -> list[tuple[str, float]]:
    """The training loss of each step and the validation loss of each epoch, with labels."""
    training = result["training"]
    return [
        *((f"step {line['step']}", line["loss"]) for line in training["steps_log"]),
        *((f"validation {line['epoch']}", line["validation_loss"]) for line in training["epochs_log"]),
    ]


def find_difference(expected: list[tuple[str, float]], found: list[tuple[str, float]]) -> float:
    if [name for name, _ in expected] != [name for name, _ in found]:
        return float("inf")
    return max(abs(one - other) for (_, one), (_, other) in zip(expected, found, strict=True))


def compare_curves(ways: Ways, model: str) -> tuple[Table, list[tuple[str, float]], float]:
    """A table of all curves, the curve of one process, and the largest difference from it."""
    curves = {way: read_losses(ways.run(way, model, f"{model}-{number}")) for number, way in enumerate(ways.commands)}
    expected = curves[ALONE]
    table = Table(title=f"{model}: loss, nats per token")
    table.add_column("")
    for way in curves:
        table.add_column(way, justify="right")
    steps = [index for index, (name, _) in enumerate(expected) if name.startswith("step")]
    shown = {*steps[:: max(1, len(steps) // SHOWN_STEPS)], *range(len(steps), len(expected))}
    for index in sorted(shown):
        table.add_row(expected[index][0], *(f"{curve[index][1]:.7f}" for curve in curves.values()))
    differences = [find_difference(expected, curve) for curve in curves.values()]
    table.add_row(f"largest difference of {len(expected)}", *(f"{difference:.1e}" for difference in differences))
    return table, expected, max(differences)


def compare_checkpoints(ways: Ways, model: str, expected: list[tuple[str, float]]) -> tuple[Table, float]:
    """Stop each kind of training in the middle, and resume it as each other kind."""
    table = Table(title=f"{model}: stopped by SIGTERM, resumed as another kind")
    for header in ("begun as", "stopped at step", "resumed as", "largest difference"):
        table.add_column(header, justify="right" if header[0] in "sl" else "left")
    worst = 0.0
    middle = sum(name.startswith("step") for name, _ in expected) // 2
    for number, (first, second) in enumerate(itertools.permutations(ways.commands, 2)):
        name = f"{model}-resumed-{number}"
        step = ways.stop(first, model, name, middle)
        difference = find_difference(expected, read_losses(ways.run(second, model, name, resume=True)))
        table.add_row(first, str(step), second, f"{difference:.1e}")
        worst = max(worst, difference)
    return table, worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["infini", "hierarchical"])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--quick", action="store_true", help="a few steps of one model")
    arguments, flags = parser.parse_known_args()
    models = arguments.models[:1] if arguments.quick else arguments.models
    console = Console(width=120)
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        all_flags = [*SETTINGS, *(QUICK if arguments.quick else []), *flags]
        ways = Ways(Path(folder), all_flags, arguments.processes)
        for model in models:
            table, expected, difference = compare_curves(ways, model)
            console.print(table)
            resumed, other = compare_checkpoints(ways, model, expected)
            console.print(resumed)
            worst = max(worst, difference, other)
    console.print(f"Largest difference from one process: {worst:.1e}; allowed: {arguments.tolerance:.0e}.")
    if not worst <= arguments.tolerance:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
