"""What is left of the processes' groups when a process ends."""

import atexit
import sys
from pathlib import Path

import pytest

from new_llm.processes import Processes, _end_processes
from training_cases import make_trainer, run_processes


def count_gloo_threads() -> int:
    return sum(name.read_text() == "pt_gloo_runloop\n" for name in Path("/proc/self/task").glob("*/comm"))


def train_and_count(processes: Processes, folder: Path) -> None:
    """Train, and note how many threads the groups have before and after the process takes leave of the other."""
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
