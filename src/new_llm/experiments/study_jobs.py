"""Execute the runs of a study: one after the other, in parallel processes, or as jobs of a cluster.

The output of each run goes to a log file, and its progress is read from its `metrics.jsonl`. A terminal shows a live
view of all runs; elsewhere, a line is printed whenever a run ends.
"""

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from new_llm.config import UserError
from new_llm.config.files import name_refusals
from new_llm.config.terminal import make_line
from new_llm.config.train import ClusterConfig
from new_llm.formats import format_seconds
from new_llm.training import TrainingInterrupted
from new_llm.training.log import METRICS_FILE, read_last_metrics

LOGS_FOLDER = "logs"
JOBS_FOLDER = "jobs"
"""The folder for submitit's own files."""
INTERRUPTED, BAD_INPUT = 130, 2
"""Exit codes of a run's process, the same as the command's."""
TIMEOUT_MINUTES, MAX_TIMEOUTS = 1440, 10
POLL_SECONDS = 0.2
"""Interval between checks of the runs; submitit queries SLURM less often."""


@dataclass(frozen=True)
class Cell:
    """One run of a study: a variant trained with a seed."""

    variant: str
    seed: int

    @property
    def name(self) -> str:
        """The run's name."""
        return f"{self.variant}-s{self.seed}"


Work = Callable[[Cell], None]
"""Trains and measures one cell; a module-level function, or a partial of one, so that it can be pickled."""
Launch = Callable[[Cell, Path], Any]
"""Starts a cell's work, with output to a log file. Returns an object with a process's `exitcode` (None while it runs),
`terminate` and `join`."""


class Pool:
    """Runs of a study, up to `size` at once (None: no limit). Call `close` at the end; it stops those still running.

    Bad input ends all runs; if a run fails in another way, the others continue. All runs can be resumed.
    """

    def __init__(self, folder: Path, size: int | None, launch: Launch) -> None:
        self.folder = folder
        self.size = size
        self.launch = launch
        self.running: dict[Cell, Any] = {}
        self.failures: list[str] = []
        """A line for each run that failed without ending the others."""

    def start(self, cell: Cell) -> None:
        """Start a cell."""
        self.running[cell] = self.launch(cell, self.find_log(cell).absolute())

    @property
    def has_room(self) -> bool:
        """Whether another run may be started."""
        return self.size is None or len(self.running) < self.size

    def wait(self) -> list[Cell]:
        """Wait until at least one cell has ended; returns those that ended without failure.

        Raises:
            UserError: a run had bad input; the message has its name, its last line, and its log.
            TrainingInterrupted: a run was interrupted.
        """
        while not (ended := {cell: code for cell, run in self.running.items() if (code := run.exitcode) is not None}):
            time.sleep(POLL_SECONDS)
        for cell, code in ended.items():
            del self.running[cell]
            if code == INTERRUPTED:
                raise TrainingInterrupted(f"{cell.name}: interrupted", self.folder / cell.name)
            if code:
                log = self.find_log(cell)
                lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
                why = lines[-1].strip() if lines else f"its process ended with {code}"
                self.failures.append(f"{cell.name}: {why}; see {log}")
            if code == BAD_INPUT:  # the others would most likely fail, too
                raise UserError(self.failures[-1])
        return [cell for cell, code in ended.items() if not code]

    def close(self) -> None:
        """Ask the remaining runs to stop, and wait until they have written their checkpoints."""
        for run in self.running.values():
            run.terminate()
        for run in self.running.values():
            run.join()

    def find_log(self, cell: Cell) -> Path:
        """The log file of a cell."""
        return self.folder / LOGS_FOLDER / f"{cell.name}.log"


def open_pool(work: Work, folder: Path, jobs: int | None, cluster: ClusterConfig) -> Pool:
    """The pool for a study's cells, `jobs` at once; None: one in this process, or on a cluster all at once."""
    if cluster.executor is not None:
        executor = make_executor(cluster, folder / JOBS_FOLDER)
        sharing = jobs if cluster.executor == "local" else None
        return Pool(folder, jobs, partial(ClusterJob, executor, sharing, work))
    if jobs is None or jobs == 1:
        return Pool(folder, 1, partial(InTurn, work))
    return Pool(folder, jobs, partial(start_process, jobs, work))


@contextmanager
def write_log(log: Path) -> Iterator[None]:
    """Append everything that this process prints in the block to a log file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with name_refusals(log), log.open("a", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        yield


def do_alone(work: Work, cell: Cell, log: Path) -> None:
    """The body of a run's own process: an error ends it with a message in the log and an exit code."""
    with write_log(log):
        try:
            work(cell)
        except (TrainingInterrupted, KeyboardInterrupt):
            sys.exit(INTERRUPTED)
        except UserError as error:
            print(make_line(error))
            sys.exit(BAD_INPUT)
        except Exception:
            traceback.print_exc()
            sys.exit(1)


class InTurn(NamedTuple):
    """A run in this process; reading `exitcode` executes it."""

    work: Work
    cell: Cell
    log: Path

    @property
    def exitcode(self) -> int:
        """Execute the run."""
        with write_log(self.log):
            try:
                self.work(self.cell)
            except UserError as error:
                print(make_line(error))
                raise type(error)(f"{self.cell.name}: {error}") from error
        return 0

    def terminate(self) -> None:
        """Do nothing: the run has ended."""

    join = terminate


def start_process(jobs: int, work: Work, cell: Cell, log: Path) -> BaseProcess:
    """Start a run in its own process with its share of the cores."""
    process = multiprocessing.get_context("spawn").Process(target=_catch_sigterm, args=(work, cell, log))
    with share_cores(jobs):
        process.start()
    return process


def _catch_sigterm(work: Work, cell: Cell, log: Path) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # during training, the trainer handles both signals
    do_alone(work, cell, log)


@contextmanager
def share_cores(jobs: int) -> Iterator[None]:
    """Let each process started in the block use 1/jobs of the cores, unless the user has set OMP_NUM_THREADS."""
    name = "OMP_NUM_THREADS"
    given = os.environ.get(name)
    os.environ[name] = given or str(max(1, (os.cpu_count() or 1) // jobs))
    try:
        yield
    finally:
        if given is None:
            del os.environ[name]


class ClusterJob:
    """A run submitted as a job by submitit; with `jobs`, it gets 1/jobs of this machine's cores."""

    def __init__(self, executor: Any, jobs: int | None, *arguments: Any) -> None:
        with share_cores(jobs) if jobs else nullcontext():
            self.job = executor.submit(Job(), *arguments)

    @property
    def exitcode(self) -> int | None:
        """0: succeeded; 1: failed; None: running or waiting."""
        # A job writes its result only if it succeeded. The file itself is not read: everything is in the run folder.
        return int(not self.job.paths.result_pickle.exists()) if self.job.done() else None

    def terminate(self) -> None:
        """Cancel the job."""
        self.job.cancel(check=False)

    def join(self) -> None:
        """Do nothing: the cluster ends the job."""


class Job:
    """The function that submitit calls. A job that is preempted or out of time is queued again and resumes its run."""

    def __call__(self, work: Work, cell: Cell, log: Path) -> None:
        """Do the work."""
        do_alone(work, cell, log)

    def checkpoint(self, *arguments: Any) -> Any:
        """Submit the same job again: the run continues from its last checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, *arguments)


def make_executor(settings: ClusterConfig, folder: Path) -> Any:
    """submitit's executor with a study's settings."""
    try:
        import submitit
    except ImportError:
        raise UserError("--cluster: submitit is not installed: pip install new-llm[cluster]") from None
    name = settings.executor
    timeouts = MAX_TIMEOUTS if settings.max_timeouts is None else settings.max_timeouts
    try:
        executor = submitit.AutoExecutor(folder, cluster=name, **{f"{name}_max_num_timeout": timeouts})
        executor.update_parameters(
            name="new-llm",
            timeout_min=settings.timeout_minutes or TIMEOUT_MINUTES,
            mem_gb=settings.memory_gb,
            cpus_per_task=settings.cpus_per_task,
            gpus_per_node=settings.gpus_per_node,
            slurm_partition=settings.partition,
            slurm_account=settings.account,
            slurm_setup=list(settings.setup) or None,
            slurm_additional_parameters=settings.options or None,
        )
    except (RuntimeError, ValueError, NameError) as error:
        raise UserError(f"--cluster {name}: {make_line(error)}") from None
    return executor


# Progress


MAX_LINES, NAME_COLUMNS, BAR_COLUMNS = 20, 22, 8


class StudyProgress:
    """Show a study's progress while the block runs.

    Args:
        running: the current runs; the caller keeps changing this mapping.
        num_left: number of runs that were not complete at the start.
    """

    def __init__(
        self, folder: Path, running: Mapping[Cell, Any], num_cells: int, num_left: int, console: Console
    ) -> None:
        self.folder = folder
        self.running = running
        self.num_cells = num_cells
        self.num_done = num_cells - num_left
        self.console = console
        self.begun: dict[Cell, float] = {}
        """Start time of each run."""
        self.seconds: list[float] = []
        """Durations of the runs that have ended."""
        self._live = Live(console=console, get_renderable=self.render, refresh_per_second=2, transient=True)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.console.file = self.console.file  # fix it to the terminal while a run's output goes to its log
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def begin(self, cell: Cell) -> None:
        """Note that a run starts, or, after its training, its measurement."""
        self.begun.setdefault(cell, time.monotonic())

    def end(self, cell: Cell) -> None:
        """Note that a run is done, and print a line."""
        self.seconds.append(time.monotonic() - self.begun[cell])
        self.num_done += 1
        self.console.print(f"{cell.name}: done, {self.describe_rest()}", highlight=False)

    def describe_rest(self) -> str:
        """How many runs are done, and an estimate of the remaining time from their durations."""
        text = f"{self.num_done} of {self.num_cells}"
        left = self.num_cells - self.num_done
        if not left or not self.seconds:
            return text
        seconds = sum(self.seconds) / len(self.seconds) * left / (len(self.running) + 1)
        return f"{text}, about {format_seconds(seconds)} left"

    def render(self) -> Group:
        """A line for each current run and one for the study, at most 60 columns wide."""
        table = Table.grid(padding=(0, 1))
        table.add_column(no_wrap=True, max_width=NAME_COLUMNS)
        for width in (BAR_COLUMNS, 4, None):
            table.add_column(no_wrap=True, width=width)
        for cell in list(self.running)[:MAX_LINES]:
            found = (read_last_metrics(path.parent) for path in (self.folder / cell.name).glob(f"*/{METRICS_FILE}"))
            last = next(filter(None, found), {"share": 0.0})
            loss, share = last.get("loss", last.get("validation_loss")), last.get("share", 1.0)
            said = f"epoch {last['epoch']}" if "epoch" in last else "waiting"
            said += f", loss {loss:.3f}" if isinstance(loss, float) else ""
            table.add_row(cell.name, ProgressBar(1.0, share), f"{share:4.0%}", said)
        return Group(table, f"runs done: {self.describe_rest()}")
