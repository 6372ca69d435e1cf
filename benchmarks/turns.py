"""Worker processes that take turns: each measures one thing, and sleeps while the others run."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from rich.table import Table

from new_llm.training.devices import read_peak_memory

Answers = dict[str, list[dict[str, Any]]]
"""By worker: seconds, cpu_seconds and peak (bytes) for each round."""


class Worker:
    """A process that measures on request.

    Args:
        command: a program that calls `serve`.
        threads: torch's threads.
    """

    def __init__(self, command: Sequence[str], threads: int) -> None:
        self.answers: list[dict[str, Any]] = []
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        environment |= {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._read()

    def run(self, steps: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        self.answers.append(self._read())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a process ended: {self.process.wait()}")
        return json.loads(line)


def serve(step: Callable[[], object], device: torch.device, *, warm_up: int = 2) -> None:
    """Read numbers of steps from stdin, one per line; answer each with a line of JSON.

    Args:
        step: the function to time; if it returns a float, this counts as its seconds.
        device: the device it runs on.
        warm_up: steps before the first answer.
    """
    for _ in range(warm_up):
        step()
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        begin, seconds = time.process_time(), 0.0
        for _ in range(int(line)):
            start = time.perf_counter()
            own = step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds += own if isinstance(own, float) else time.perf_counter() - start
        answer = {
            "seconds": seconds / int(line),
            "cpu_seconds": (time.process_time() - begin) / int(line),
            "peak": read_peak_memory(device),
        }
        print(json.dumps(answer), flush=True)


def take_turns(commands: Mapping[str, Sequence[str]], *, rounds: int, steps: int, threads: int) -> Answers:
    """Start a worker for each command; in every round each makes `steps` steps, one worker after the other."""
    workers: dict[str, Worker] = {}
    try:
        for name, command in commands.items():
            workers[name] = Worker(command, threads)
        for _ in range(rounds):
            for worker in workers.values():
                worker.run(steps)
    finally:
        for worker in workers.values():
            worker.close()
    return {name: worker.answers for name, worker in workers.items()}


def compare(answers: Answers, name: str, base: str, what: str = "seconds") -> float:
    """The speed of `name` relative to `base`: the median of the ratios within rounds."""
    pairs = zip(answers[name], answers[base], strict=True)
    return statistics.median(other[what] / one[what] for one, other in pairs)


def describe_spread(values: Sequence[float]) -> str:
    """Half of the range, relative to the median."""
    return f"±{(max(values) - min(values)) / 2 / statistics.median(values):.0%}"


def tabulate(
    title: str, answers: Answers, num_tokens: int, bases: Sequence[str], *, ceiling: float | None = None
) -> Table:
    """A table with a row per worker: speed, speed relative to the bases, spread and peak memory.

    Args:
        title: the table's title.
        answers: the result of `take_turns`.
        num_tokens: tokens per step.
        bases: workers with which all are compared, by time and by processor seconds.
        ceiling: tokens/s of which each speed is also shown as a share.
    """
    table = Table(title=title)
    ratios = [f"of {base}" for base in bases] + [f"by CPU seconds, of {base}" for base in bases]
    share = [] if ceiling is None else ["of the ceiling"]
    for column in ("model", "tokens/s (median)", *ratios, "spread", *share, "peak memory"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, values in answers.items():
        speeds = [num_tokens / value["seconds"] for value in values]
        middle = statistics.median(speeds)
        table.add_row(
            name,
            f"{middle:,.1f}",
            *(f"{compare(answers, name, base, key):.3f}" for key in ("seconds", "cpu_seconds") for base in bases),
            describe_spread(speeds),
            *([] if ceiling is None else [f"{middle / ceiling:.0%}"]),
            f"{max(value['peak'] for value in values) / 2**30:.2f} GiB",
        )
    return table
