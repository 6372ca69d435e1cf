"""The machine that training runs on: device and precision, random generators, memory use, and stop signals."""

import os
import random
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from new_llm.config import UserError
from new_llm.config.terminal import handle_signals

CUBLAS_WORKSPACE = ":4096:8"
"""Makes cuBLAS deterministic (NVIDIA's cuBLAS documentation, 2.1.4)."""


def choose_device(name: str) -> torch.device:
    """Return the named device; `auto` is a GPU if there is one. Raise a `UserError` if it is unknown or missing."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda was requested, but torch sees no GPU; use auto or cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise UserError(f"--device: {name!r} is unknown; allowed are auto, cpu, cuda and cuda:N") from None


def choose_precision(name: str, device: torch.device) -> str:
    """Return the named precision; `auto` is bf16 if the hardware supports bf16 multiplication, else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"


def make_autocast(precision: str, device: torch.device) -> Callable[[], AbstractContextManager[object]]:
    """Return a function that makes the autocast context for both training and evaluation."""
    if precision == "bf16":
        return lambda: torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext


@contextmanager
def compute_deterministically(is_wanted: bool = True) -> Iterator[None]:
    """Let torch use only deterministic algorithms inside the block; an op without one raises an error.

    For equal results the number of threads must be equal, too, because it determines how sums are split;
    `environment.json` records it.
    """
    if not is_wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE)
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        cudnn.deterministic, cudnn.benchmark = before[1:]


# Random generators


def seed_generators(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)  # on every device


def read_random_states() -> dict[str, Any]:
    """Return the states of all generators as plain values that load with `weights_only=True`."""
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)
    return {
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        "numpy": {
            "words": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
            "position": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Restore what `read_random_states` returned; states of missing GPUs are ignored."""
    python, numbers = states["python"], states["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    words = numbers["words"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", words, numbers["position"], numbers["has_gauss"], numbers["gauss"]))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available():
        for device, state in zip(range(torch.cuda.device_count()), states["cuda"], strict=False):
            torch.cuda.set_rng_state(state, device)


# Memory in use


def read_used_bytes(device: torch.device) -> int:
    """Return the bytes allocated on a GPU, or the process's resident size on a CPU (0 if unknown)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak that `read_peak_memory` returns, if the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak resident size
        except OSError:
            return


def read_peak_memory(device: torch.device) -> int:
    """Return the peak bytes since `reset_peak_memory`: allocated on a GPU, or the process's resident size on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# Stop signals


STOP_SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1
"""Ctrl-C; the signal that systems send before SIGKILL; and the early warning that some clusters send before that."""


class TrainingInterrupted(KeyboardInterrupt):
    """Training was interrupted and can be resumed from the model's `folder`."""

    def __init__(self, message: str, folder: Path) -> None:
        super().__init__(message)
        self.folder = folder


@contextmanager
def interrupt_training(folder: Path) -> Iterator[None]:
    """Turn a KeyboardInterrupt in the work on one model into TrainingInterrupted, so that the run can be resumed."""
    try:
        yield
    except TrainingInterrupted:
        raise
    except KeyboardInterrupt:
        raise TrainingInterrupted(f"interrupted; finished work is in {folder}", folder) from None


class StopSignals:
    """Call it to find out whether a stop signal has arrived. See `catch_stop_signals`."""

    def __init__(self, repeats_end: bool) -> None:
        self.repeats_end = repeats_end
        self._num_received = 0
        self._interrupts = False

    def __call__(self) -> bool:
        """Return whether a signal has arrived."""
        return self._num_received > 0

    @contextmanager
    def interrupt(self) -> Iterator[None]:
        """Let signals, even earlier ones, raise KeyboardInterrupt inside the block; for work that can be repeated."""
        self._interrupts = True
        try:
            if self():
                raise KeyboardInterrupt
            yield
        finally:
            self._interrupts = False

    def note(self, *_: object) -> None:
        """Handle a signal."""
        self._num_received += 1
        if self._interrupts or (self._num_received > 1 and self.repeats_end):
            raise KeyboardInterrupt


@contextmanager
def catch_stop_signals(*, repeats_end: bool = True) -> Iterator[StopSignals]:
    """Inside the block `STOP_SIGNALS` only set a flag that the loop checks; with `repeats_end` a second one interrupts.

    Pass False under a launcher, which forwards to every process a signal that the terminal has already sent to it.
    """
    stop = StopSignals(repeats_end)
    with handle_signals(STOP_SIGNALS, stop.note):
        yield stop
