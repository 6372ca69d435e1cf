"""Filling a memory file from a run's model: checks first, one process or several, the file at the end."""

import os
import queue
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch

from new_llm.config import UserError
from new_llm.config.evaluation import FillConfig
from new_llm.config.files import make_temporary_folder
from new_llm.experiments.memory_filling import FillResult, State, add_state, fill_memory, memory_adds
from new_llm.experiments.run_folder import load_run_model
from new_llm.experiments.text_blocks import OnBytes, check_text_files
from new_llm.models.memory_file import read_memory_file, save_memory_file
from new_llm.models.tensor_files import fingerprint_weights
from new_llm.training.devices import choose_device
from new_llm.training.signals import catch_stop_signals

POLL_SECONDS = 0.1


def fill_memory_from_run(
    run: Path,
    paths: Sequence[Path],
    out: Path,
    *,
    model_name: str | None = None,
    processes: int = 1,
    device: str = "auto",
    config: FillConfig | None = None,
    on_bytes: OnBytes = lambda _: None,
    on_note: Callable[[str], None] = lambda _: None,
) -> FillResult:
    """Fill an empty memory with a run's model and write it to a file.

    With several processes the calling program must be importable (`if __name__ == "__main__":`), as the
    command always is.

    Args:
        run: a run folder or a model's folder; see `find_model_folder`.
        paths: text files.
        out: the memory file to write.
        model_name: which model of the run; None: its only one with memory.
        processes: processes that read files, where memory adds.
        device: auto, cpu, cuda or cuda:N.
        config: sizes of what is held at once.
        on_bytes: told of the bytes read since the last call, in this process.
        on_note: told, in one line, what the reader should know of how it is done.

    Returns:
        What was read.

    Raises:
        UserError: anything wrong with the run, the texts or the place to write; `out` is as it was.
    """
    if processes < 1:
        raise UserError(f"--processes: {processes} is not positive")
    check_text_files(paths)
    model, tokenizer = load_run_model(run, model_name, needs_memory=True)
    check_output(out, paths)
    adds = memory_adds(model)
    used = min(processes, len(paths)) if adds else 1
    if len(paths) > 1 and not adds:
        on_note(
            "this memory does not add (delta rule or decay): the files are read one after another, in the order given"
        )
    elif used < processes:
        on_note(f"{len(paths)} file{'s' * (len(paths) > 1)} to read: {used} of {processes} processes used")
    model.to(find_device(device))
    if used == 1:
        result = fill_memory(model, tokenizer, paths, config=config, on_bytes=on_bytes)
    else:
        with make_temporary_folder(out) as folder:
            parts = [folder / f"{number}.safetensors" for number in range(len(paths))]
            task = _Task(run, model_name, device, max(1, torch.get_num_threads() // used), config)
            result = _fill_in_processes(task, paths, parts, used, on_bytes)
            state: State | None = None
            for part in parts:
                state = add_state(state, read_memory_file(part).state)
            model.set_memory_state(state or {})
    save_memory_file(model, out)
    return result


def find_device(name: str) -> torch.device:
    """A device by its name.

    Raises:
        UserError: there is no such device.
    """
    try:
        return choose_device(name)
    except RuntimeError:
        raise UserError(f"--device: {name!r} is unknown; allowed are auto, cpu, cuda and cuda:N") from None


def check_output(out: Path, inputs: Iterable[Path] = ()) -> None:
    """Refuse, before the work, a place where a memory file can't be written.

    Raises:
        UserError: not *.safetensors, a folder, one of the inputs, or a place that is read-only.
    """
    if out.suffix != ".safetensors":
        raise UserError(f"--out: {out} must end in .safetensors")
    if out.is_dir():
        raise UserError(f"--out: {out} is a folder")
    if out.exists() and any(out.samefile(path) for path in inputs):
        raise UserError(f"--out: {out} is one of the files to read")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out.parent).close()
    except OSError as error:
        raise UserError(f"--out: can't write to {out.parent}: {error.strerror or error}") from None


# Several processes


@dataclass(frozen=True)
class _Task:
    """What every process needs to make the model for itself."""

    run: Path
    model_name: str | None
    device: str
    num_threads: int
    config: FillConfig | None


class _StoppedError(Exception):
    """The asking process wants no more."""


class _Worker:
    """One process's model, and its lines to the process that asked."""

    current: "_Worker"

    def __init__(self, task: _Task, counts: Any, stop: Any) -> None:
        torch.set_num_threads(task.num_threads)
        self.model, self.tokenizer = load_run_model(task.run, task.model_name, needs_memory=True)
        self.model.to(find_device(task.device))
        self.fingerprint = fingerprint_weights(self.model)
        self.task = task
        self.counts = counts
        self.stop = stop

    def report(self, num_bytes: int) -> None:
        """Tell the asking process of the bytes read; stop where it asks to."""
        self.counts.put(num_bytes)
        if self.stop.is_set():
            raise _StoppedError


def _start_worker(task: _Task, counts: Any, stop: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the asking process is interrupted too, and sets `stop`
    threading.Thread(target=_end_with_parent, daemon=True).start()
    counts.cancel_join_thread()  # counts that nobody waits for must not keep the process
    _Worker.current = _Worker(task, counts, stop)


def _end_with_parent() -> None:
    """End this process when the asking one has: killed, it can't ask for it, and nobody would wait for the result."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _fill_part(path: Path, part: Path) -> FillResult:
    worker = _Worker.current
    result = fill_memory(worker.model, worker.tokenizer, [path], config=worker.task.config, on_bytes=worker.report)
    save_memory_file(worker.model, part, weights_fingerprint=worker.fingerprint)
    return result


def _fill_in_processes(
    task: _Task, paths: Sequence[Path], parts: Sequence[Path], processes: int, on_bytes: OnBytes
) -> FillResult:
    """Read each file into a part of its own, the largest first."""
    context = get_context("spawn")  # torch's threads do not survive a fork
    counts, stop = context.Queue(), context.Event()
    began = time.perf_counter()
    jobs = sorted(zip(paths, parts, strict=True), key=lambda job: -job[0].stat().st_size)
    # An interrupt is only noted, and taken up between two waits: raised inside the executor it can leave a lock held.
    with catch_stop_signals() as is_interrupted, _make_pool(processes, task, counts, stop) as pool:
        try:
            futures = [pool.submit(_fill_part, *job) for job in jobs]
            results = _wait(futures, counts, on_bytes, is_interrupted)
        except BrokenProcessPool:
            raise UserError(
                "a process that read texts ended early: out of memory (try fewer --processes), or started "
                "from a script without `if __name__ == '__main__':`"
            ) from None
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return FillResult(
        num_files=len(paths),
        num_tokens=sum(result.num_tokens for result in results),
        num_segments=sum(result.num_segments for result in results),
        num_processes=processes,
        seconds=time.perf_counter() - began,
    )


def _make_pool(processes: int, task: _Task, counts: Any, stop: Any) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(processes, get_context("spawn"), _start_worker, (task, counts, stop))


def _wait(
    futures: Sequence[Future[FillResult]], counts: Any, on_bytes: OnBytes, is_interrupted: Callable[[], bool]
) -> list[FillResult]:
    """The results, or the first error; meanwhile passes on what the processes have read."""
    left = set(futures)
    while left:
        if is_interrupted():
            raise KeyboardInterrupt
        done, left = wait(left, timeout=POLL_SECONDS, return_when=FIRST_EXCEPTION)
        while True:
            try:
                on_bytes(counts.get_nowait())
            except queue.Empty:
                break
        for future in done:
            future.result()
    return [future.result() for future in futures]
