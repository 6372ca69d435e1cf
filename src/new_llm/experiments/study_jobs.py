"""Several runs of a study at once: one after the other, in processes of their own, or as jobs of a cluster.

Whichever way, a run writes what it prints to a log file, and whatever it has done is on the disk: the progress of all
runs, one live view on a terminal and a line per run elsewhere, is read from their `metrics.jsonl`.
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
"""Where submitit keeps its own files of each job."""
INTERRUPTED, BAD_INPUT = 130, 2
"""Exit codes of a run's process, those of the command."""
TIMEOUT_MINUTES, MAX_TIMEOUTS = 1440, 10
POLL_SECONDS = 0.2
"""Between two looks at what runs; submitit asks SLURM itself less often."""


@dataclass(frozen=True)
class Cell:
    """One training of a study."""

    variant: str
    seed: int

    @property
    def name(self) -> str:
        """The run's name."""
        return f"{self.variant}-s{self.seed}"


Work = Callable[[Cell], None]
"""Trains and measures one cell; a function of a module, or a partial of one, so that other processes find it."""
Launch = Callable[[Cell, Path], Any]
"""Begins a cell's work, which prints to a log file. What it returns has a process's `exitcode` (None while it runs),
`terminate` and `join`."""


class Pool:
    """Runs of a study, `size` at once (None: any number). `close` it at the end: what still runs is stopped.

    Bad input ends all; if a run fails in another way, the others continue. Trainings are resumable.
    """

    def __init__(self, folder: Path, size: int | None, launch: Launch) -> None:
        self.folder = folder
        self.size = size
        self.launch = launch
        self.running: dict[Cell, Any] = {}
        self.failures: list[str] = []
        """A line for each run that failed without ending the others."""

    def start(self, cell: Cell) -> None:
        """Begin a cell."""
        self.running[cell] = self.launch(cell, self.find_log(cell).absolute())

    @property
    def has_room(self) -> bool:
        """Whether another run may begin."""
        return self.size is None or len(self.running) < self.size

    def wait(self) -> list[Cell]:
        """Wait until some cell has ended; returns those that have, failed ones left out.

        Raises:
            UserError: one had bad input: its name, its last line, and its log.
            TrainingInterrupted: one was asked to stop.
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
                self.failures.append(f"{cell.name}: {why}; more is in {log}")
            if code == BAD_INPUT:  # the others would most likely end so, too
                raise UserError(self.failures[-1])
        return [cell for cell, code in ended.items() if not code]

    def close(self) -> None:
        """Ask what still runs to stop, and wait until it has written its checkpoints."""
        for run in self.running.values():
            run.terminate()
        for run in self.running.values():
            run.join()

    def find_log(self, cell: Cell) -> Path:
        """The log of a cell."""
        return self.folder / LOGS_FOLDER / f"{cell.name}.log"


def open_pool(work: Work, folder: Path, jobs: int | None, cluster: ClusterConfig) -> Pool:
    """What runs a study's cells, `jobs` at once: by default one in this process, or all of them on a cluster."""
    if cluster.executor is not None:
        executor = make_executor(cluster, folder / JOBS_FOLDER)
        cores = jobs if cluster.executor == "local" else None
        return Pool(folder, jobs, partial(ClusterJob, executor, cores, work))
    if jobs is None or jobs == 1:
        return Pool(folder, 1, partial(InTurn, work))
    return Pool(folder, jobs, partial(start_process, jobs, work))


@contextmanager
def write_log(log: Path) -> Iterator[None]:
    """Inside the block all that this process prints is added to a log file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with name_refusals(log), log.open("a", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        yield


def do_alone(work: Work, cell: Cell, log: Path) -> None:
    """The body of a process that does nothing else: an error ends it with a line in the log and an exit code."""
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
    """A run in this process, which does it when it is asked how it ended."""

    work: Work
    cell: Cell
    log: Path

    @property
    def exitcode(self) -> int:
        """Do all of it."""
        with write_log(self.log):
            self.work(self.cell)
        return 0

    def terminate(self) -> None:
        """Nothing is left to stop."""

    join = terminate


def start_process(jobs: int, work: Work, cell: Cell, log: Path) -> BaseProcess:
    """A run in a process of its own with its share of the cores."""
    process = multiprocessing.get_context("spawn").Process(target=_catch_sigterm, args=(work, cell, log))
    with share_cores(jobs):
        process.start()
    return process


def _catch_sigterm(work: Work, cell: Cell, log: Path) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # training itself catches both
    do_alone(work, cell, log)


@contextmanager
def share_cores(jobs: int) -> Iterator[None]:
    """Processes started inside the block use 1/jobs of the cores each; a user's OMP_NUM_THREADS wins."""
    name = "OMP_NUM_THREADS"
    given = os.environ.get(name)
    os.environ[name] = given or str(max(1, (os.cpu_count() or 1) // jobs))
    try:
        yield
    finally:
        if given is None:
            del os.environ[name]


class ClusterJob:
    """A run that submitit submits as a job; `cores`: it takes this many cores' share of the machine."""

    def __init__(self, executor: Any, cores: int | None, *arguments: Any) -> None:
        with share_cores(cores) if cores else nullcontext():
            self.job = executor.submit(Job(), *arguments)

    @property
    def exitcode(self) -> int | None:
        """0 or 1; None: it runs, or waits."""
        # A job writes its result only if it ended well. The file is not read: the run folder holds all there is.
        return int(not self.job.paths.result_pickle.exists()) if self.job.done() else None

    def terminate(self) -> None:
        """Cancel it."""
        self.job.cancel(check=False)

    def join(self) -> None:
        """The cluster waits."""


class Job:
    """What submitit runs. A job that is preempted or out of time is queued again, and continues its run."""

    def __call__(self, work: Work, cell: Cell, log: Path) -> None:
        """Do the work."""
        do_alone(work, cell, log)

    def checkpoint(self, *arguments: Any) -> Any:
        """The same again: a run continues from its last checkpoint."""
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
    """Shows how far a study is, while its block runs.

    Args:
        running: the runs that are under way, as it changes.
        num_left: the runs that were not complete before.
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
        """When each run began."""
        self.seconds: list[float] = []
        """How long each took that has ended."""
        self._live = Live(console=console, get_renderable=self.render, refresh_per_second=2, transient=True)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.console.file = self.console.file  # stays the terminal while a run's own output goes to its log
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def begin(self, cell: Cell) -> None:
        """A run begins, or what it has trained is now measured."""
        self.begun.setdefault(cell, time.monotonic())

    def end(self, cell: Cell) -> None:
        """A run is done."""
        self.seconds.append(time.monotonic() - self.begun[cell])
        self.num_done += 1
        self.console.print(f"{cell.name}: done, {self.describe_rest()}", highlight=False)

    def describe_rest(self) -> str:
        """How many runs are done, and how long the others will take if they are like those."""
        text = f"{self.num_done} of {self.num_cells}"
        left = self.num_cells - self.num_done
        if not left or not self.seconds:
            return text
        seconds = sum(self.seconds) / len(self.seconds) * left / (len(self.running) + 1)
        return f"{text}, about {format_seconds(seconds)} left"

    def render(self) -> Group:
        """A line for each run that is under way, and one for all; 60 columns are enough."""
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
