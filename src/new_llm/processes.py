"""The processes that train one model together: which one this is, and what they say to one another.

A launcher (`torchrun`, `accelerate launch`, `srun`) starts the same command several times and tells each its RANK and
the WORLD_SIZE. What is said here goes over the host (gloo), whatever the gradients take, and waits as long as it has
to: one process may tokenize for hours while the others wait for it.
"""

import atexit
import datetime
import gc
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # before the processes meet: its functions' defaults keep the group that they find
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from new_llm.config.errors import OtherProcessError, UserError

Value = TypeVar("Value")

HOST_TIMEOUT = datetime.timedelta(days=14)
"""How long a process waits for what another does alone."""
FAILURES_KEY, FAILURE_KIND_KEY = "failures", "failure_kind"
USER_ERRORS = (UserError, OSError)
"""What the command answers in one line and with the exit code of bad input."""
STORE_TIMEOUT = datetime.timedelta(seconds=10)
LAUNCHER_OPTIONS = {
    "ACCELERATE_USE_FSDP": "--use_fsdp",
    "ACCELERATE_USE_DEEPSPEED": "--use_deepspeed",
    "ACCELERATE_USE_MEGATRON_LM": "--use_megatron_lm",
}


@dataclass(frozen=True)
class Processes:
    """This process among those that work together. Every method is called by all of them, in the same order.

    Attributes:
        rank: this process, from 0; the main process is 0, and it alone writes files.
        count: how many there are.
        local_rank: this process among those of its machine.
        group: what the host talks over; None: there is one process.
        store: where failures are noted.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    group: Any = None
    store: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def place(self, device: torch.device) -> torch.device:
        """This process's own device of a kind.

        Raises:
            UserError: the machine has fewer GPUs than processes.
        """
        if device.type != "cuda" or self.count == 1:
            return device
        if self.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {self.rank} is number {self.local_rank + 1} on its machine, which has "
                f"{torch.cuda.device_count()} GPUs: start as many processes as there are GPUs, or take --device cpu"
            )
        own = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(own)
        return own

    def slice_rows(self, num_rows: int, what: str = "train.batch_size") -> slice:
        """The rows of a batch that this process reads: equally many each, in the order of ranks.

        Raises:
            UserError: the processes do not divide the rows.
        """
        if num_rows % self.count:
            raise UserError(
                f"{what}: {num_rows} rows can't be divided among {self.count} processes; it counts the rows of all "
                f"processes together and must be a multiple of {self.count}"
            )
        own = num_rows // self.count
        return slice(self.rank * own, (self.rank + 1) * own)

    def gather(self, value: Value) -> list[Value]:
        """Everyone's value, in the order of ranks."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self.group)
        return values

    def gather_on_main(self, value: Value) -> list[Value]:
        """Everyone's value, in the order of ranks, on the main process; on the others nothing."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count if self.is_main else []
        dist.gather_object(value, values if self.is_main else None, dst=0, group=self.group)
        return values

    def share(self, value: Value) -> Value:
        """The main process's value."""
        if self.count == 1:
            return value
        values: list[Any] = [value if self.is_main else None]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def sum(self, values: NDArray[Any]) -> NDArray[Any]:
        """The sum over processes, in the precision of the values."""
        if self.count == 1:
            return values
        total = torch.from_numpy(np.ascontiguousarray(values).copy())
        dist.all_reduce(total, group=self.group)
        return total.numpy()

    @contextmanager
    def agree_to_stop(self, is_asked: Callable[[], bool]) -> Iterator[Callable[[], bool]]:
        """Inside the block: a question that turns one's own wish to stop into everyone's, at the same call.

        What is wished at a call is known at the next one, so that nobody waits for the answer.
        """
        if self.count == 1:
            yield is_asked
            return
        asked: deque[tuple[Tensor, Any]] = deque()

        def hear() -> bool:
            answer, work = asked.popleft()
            work.wait()
            return bool(answer)

        def stops() -> bool:
            wish = torch.tensor([is_asked()], dtype=torch.int32)
            asked.append((wish, dist.all_reduce(wish, dist.ReduceOp.MAX, group=self.group, async_op=True)))
            return len(asked) > 1 and hear()

        try:
            yield stops
        except Exception:  # the others may never answer
            raise
        except BaseException:
            if asked:
                hear()
            raise
        if asked:
            hear()

    def sum_on_device(self, tensor: Tensor) -> Tensor:
        """The sum over processes of a small tensor where it lies; on a GPU the host does not wait for it."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def run_on_main(self, work: Callable[[], Value]) -> Value:
        """What the main process's work returns, on everyone; an error of it ends everyone.

        Raises:
            OtherProcessError: on the others, where the main process failed.
        """
        result: Any = None
        with self.agree():
            if self.is_main:
                result = work()
        return self.share(result)

    def run_main_first(self, work: Callable[[], Value]) -> Value:
        """Everyone's own result of some work that the main process does first: the others find what it has made.

        Raises:
            OtherProcessError: on the others, where one process failed.
        """
        result: Any = None
        for is_turn in (self.is_main, not self.is_main):
            with self.agree():
                if is_turn:
                    result = work()
        return result

    @contextmanager
    def agree(self) -> Iterator[None]:
        """At the block's end everyone goes on, or nobody: an error of one is an error of all.

        Raises:
            OtherProcessError: another process failed in the block.
        """
        try:
            yield
        except OtherProcessError:
            raise  # it is agreed on already
        except Exception as error:
            self._agree_on(error)
            raise
        self._agree_on(None)

    def _agree_on(self, error: Exception | None) -> None:
        if self.count == 1:
            return
        found = self.gather(None if error is None else (isinstance(error, USER_ERRORS), str(error)))
        failed = [rank for rank, entry in enumerate(found) if entry is not None]
        if not failed:
            return
        # The first process that failed tells it, once; the others end without a word.
        if error is None or failed[0] != self.rank:
            is_user_error, text = found[failed[0]] or (False, "")
            raise OtherProcessError(f"process {failed[0]}: {text}", is_user_error=is_user_error) from error

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Around all that processes do together: the first that fails tells why, and the others end without a word.

        Raises:
            OtherProcessError: another process has failed before.
        """
        try:
            yield
        except OtherProcessError:
            _State.has_failed = True
            raise
        except KeyboardInterrupt:
            self._note_failure("interrupt")
            raise
        except Exception as error:
            _State.has_failed = True
            first = self._note_failure("user" if isinstance(error, USER_ERRORS) else "other")
            if first is not None:
                raise OtherProcessError(str(error), is_user_error=first == "user") from error
            raise

    def _note_failure(self, kind: str) -> str | None:
        """The kind of the failure that came before this one; None: this is the first."""
        if self.store is None:
            return None
        try:
            if self.store.add(FAILURES_KEY, 1) == 1:
                self.store.set(FAILURE_KIND_KEY, kind)
                return None
            self.store.wait([FAILURE_KIND_KEY], STORE_TIMEOUT)
            return self.store.get(FAILURE_KIND_KEY).decode()
        except RuntimeError:  # the process that kept the notes has ended
            return "other"


ALONE = Processes()
"""The one process of a command that no launcher started."""


class _State:
    processes: Processes | None = None
    has_failed = False


def have_met() -> bool:
    """Whether this process has met the others that the launcher started."""
    return _State.processes is not None


def gather_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor of which each process may hold a share; then all of them call this."""
    gather = getattr(tensor, "full_tensor", None)  # a DTensor's; to import the class takes longer than most commands
    return tensor if gather is None else gather()


def start_processes() -> Processes:
    """Meet the other processes that the launcher started; alone without a launcher. A second call returns the first's.

    Raises:
        UserError: the launcher's variables are incomplete, or it asks for a way of training that is chosen elsewhere.
    """
    if _State.processes is not None:
        return _State.processes
    count = int(os.environ.get("WORLD_SIZE") or 1)
    if count == 1:
        return ALONE
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing or os.environ["MASTER_PORT"] == "0":
        raise UserError(
            f"WORLD_SIZE is {count}, but {', '.join(missing or ['MASTER_PORT'])} is not set: start by "
            "torchrun --standalone or accelerate launch"
        )
    for name, option in LAUNCHER_OPTIONS.items():
        if os.environ.get(name, "").lower() == "true":
            raise UserError(f"accelerate launch {option}: the way to share weights is train.sharding, ddp or fsdp")
    os.environ.setdefault("LOCAL_RANK", os.environ["RANK"])
    store = None
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        store, rank, count = next(iter(rendezvous("env://")))
        dist.init_process_group(backend, store=PrefixStore("default", store), rank=rank, world_size=count)
        atexit.register(_end_processes)
    _State.processes = Processes(
        rank=dist.get_rank(),
        count=dist.get_world_size(),
        local_rank=int(os.environ["LOCAL_RANK"]),
        group=dist.new_group(backend="gloo", timeout=HOST_TIMEOUT),
        store=store,
    )
    return _State.processes


def _end_processes() -> None:
    """Take leave of the others while Python still runs.

    A group's threads end with the group, and one of them that drops its last tensor while Python ends aborts the
    process. So nothing may hold a group any longer: trainings and their meshes are cycles, and they go before the
    groups do, since a DDP model that is the last to hold one would wait for its threads with the GIL.
    """
    if not dist.is_initialized() or _State.has_failed:  # after a failure the others may not be there to take leave
        return
    _State.processes = None
    gc.collect()
    dist.destroy_process_group()
