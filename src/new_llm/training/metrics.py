"""A run's metrics as JSON lines and TensorBoard events, and the process's peak memory."""

import json
import os
import resource
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from new_llm.config.atomic import write_text_atomically
from new_llm.training.trackers import Trackers, name_numbers

METRICS_FILE = "metrics.jsonl"
MAX_LINE_CHARACTERS = 1 << 24  # a longer line was not written here, and ends the reading
BOARD_FOLDER = "tensorboard"


class MetricsWriter:
    """Appends to `metrics.jsonl` (one JSON object a line), to TensorBoard's event files and to other trackers.

    Args:
        folder: the model's folder in the run.
        num_lines: lines to keep of those that are there, as the checkpoint counts them; an interrupted run has written
            the others after it. 0: a new run, or one that begins anew.
        step: the optimizer step that training goes on from.
        trackers: where the numbers go besides; None: nowhere.

    Attributes:
        num_lines: lines of the file.
    """

    def __init__(self, folder: Path, num_lines: int = 0, step: int = 0, trackers: Trackers | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, needed by training alone

        folder.mkdir(parents=True, exist_ok=True)
        self.trackers = trackers
        self.path = folder / METRICS_FILE
        kept = read_metrics(folder)[:num_lines]
        write_text_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.num_lines = len(kept)
        self._file = self.path.open("a", encoding="utf-8")
        if step == 0:
            shutil.rmtree(folder / BOARD_FOLDER, ignore_errors=True)  # of an attempt that got to no checkpoint
        self._thread_hook = threading.excepthook
        threading.excepthook = self._note_thread_error
        self._board = SummaryWriter(folder / BOARD_FOLDER, purge_step=step + 1 if step else None)

    def write(self, event: str, step: int, values: dict[str, Any]) -> None:
        """Add one line {"event", "step", ...}; numbers go to TensorBoard and the trackers too."""
        self._file.write(json.dumps({"event": event, "step": step, **values}) + "\n")
        self._file.flush()
        self.num_lines += 1
        for name, value in name_numbers(event, values).items():
            self._board.add_scalar(name, value, step)
        if self.trackers is not None:
            self.trackers.log(event, step, values)

    def sync(self) -> None:
        """Flush to the disk, before a checkpoint says that these lines are there."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._board.flush()

    def close(self) -> None:
        """Flush and close."""
        try:
            self.sync()
            self._file.close()
            self._board.close()
        finally:
            threading.excepthook = self._thread_hook

    def _note_thread_error(self, error: threading.ExceptHookArgs) -> None:
        # What TensorBoard's thread can't write is raised again by its writer's next call: one line says it then.
        if not type(error.thread).__module__.startswith("tensorboard."):
            self._thread_hook(error)


class SilentMetrics:
    """Stands for the metrics on a process that writes none."""

    num_lines = 0

    def write(self, event: str, step: int, values: dict[str, Any]) -> None:
        """Nothing: the main process writes the line."""

    def sync(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; a last line that was cut off in the middle is left out."""
    path = folder / METRICS_FILE
    lines: list[dict[str, Any]] = []
    if path.exists():
        with path.open(encoding="utf-8", errors="replace") as file:
            while text := file.readline(MAX_LINE_CHARACTERS):
                try:
                    line = json.loads(text)
                except (ValueError, RecursionError):
                    break
                if not isinstance(line, dict):
                    break
                lines.append(line)
    return lines


def read_memory(device: torch.device) -> int:
    """Bytes now: allocated on a GPU, resident in the process on a CPU; 0 where the system doesn't tell."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def reset_peak_memory(device: torch.device) -> None:
    """Begin to measure the peak anew, where the machine can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak resident size
        except OSError:
            return


def read_peak_memory(device: torch.device) -> int:
    """Peak bytes since `reset_peak_memory`: allocated on a GPU, resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
