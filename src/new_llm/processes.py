"""The processes that train one model together: which one this is, and how they exchange values and errors.

A launcher (`torchrun`, `accelerate launch`, `srun`) starts the same command several times with RANK and WORLD_SIZE set.
Messages go over the host (gloo), whatever carries the gradients, and wait as long as needed: one process may tokenize
for hours while the others wait for it.
"""

import atexit
import datetime
import gc
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
"""How long a process waits for work that another does alone."""
FAILURES_KEY, FAILURE_KIND_KEY = "failures", "failure_kind"
USER_ERRORS = (UserError, OSError)
"""What the command reports in one line, with the exit code of bad input."""
STORE_TIMEOUT = datetime.timedelta(seconds=10)
WATCH_SECONDS, GRACE_SECONDS = 1.0, 5.0
"""How often a process looks whether another has failed, and how long it may then take to end by itself."""
LAUNCHER_OPTIONS = ("use_fsdp", "use_deepspeed", "use_megatron_lm")
"""Of `accelerate launch`, which would wrap the model in a way of its own."""


@dataclass(frozen=True)
class Processes:
    """This process among those that work together. Every method is called by all of them, in the same order.

    Attributes:
        rank: this process, from 0; the main process is 0, and it alone writes files.
        local_rank: this process among those of its machine.
        group: the gloo group of the messages; None: there is one process.
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
        """This process's own device of a kind; two processes on one GPU are a `UserError`.

        It is the GPU of its number on the machine, or the first where the launcher shows each process only its own.
        """
        if device.type != "cuda" or self.count == 1:
            return device
        own = torch.device("cuda", self.local_rank if self.local_rank < torch.cuda.device_count() else 0)
        name = socket.gethostname(), str(torch.cuda.get_device_properties(own).uuid)
        if self.gather(name).count(name) > 1:
            raise UserError(
                f"process {self.rank} is number {self.local_rank + 1} on its machine, where it sees "
                f"{torch.cuda.device_count()} GPUs, and would share one with another process: start as many processes "
                "as there are GPUs, or take --device cpu"
            )
        torch.cuda.set_device(own)
        os.environ["LOCAL_RANK"] = str(own.index)  # from which Accelerate takes its device
        return own

    def slice_rows(self, num_rows: int, what: str = "train.batch_size") -> slice:
        """The rows of a batch that this process reads: an equal share each, in the order of ranks."""
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

    def any(self, value: bool) -> bool:
        """Whether it is so on any process."""
        return bool(self.sum(np.array([value], dtype=np.int64))[0])

    def sum_on_device(self, tensor: Tensor) -> Tensor:
        """The sum over processes of a small tensor, in place; on a GPU without synchronising."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def run_on_main(self, work: Callable[[], Value]) -> Value:
        """Run work on the main process; everyone gets its result, or fails with it (by an OtherProcessError)."""
        with self.agree():
            result: Any = work() if self.is_main else None
        return self.share(result)

    def run_main_first(self, work: Callable[[], Value]) -> Value:
        """Run work on the main process first, then on the others, which find what it has made, e.g. a cache."""
        result: Any = None
        for is_turn in (self.is_main, not self.is_main):
            with self.agree():
                if is_turn:
                    result = work()
        return result

    @contextmanager
    def agree(self) -> Iterator[None]:
        """At the block's end all processes continue, or none: an error of one is an OtherProcessError of all others."""
        error = None
        try:
            yield
        except OtherProcessError:
            raise  # all know it already
        except Exception as caught:
            error = caught
        found = self.gather(error and (isinstance(error, USER_ERRORS), str(error)))
        first = next((rank for rank, entry in enumerate(found) if entry), self.rank)
        if first != self.rank:  # only the first process that failed reports it; the others end silently
            is_user_error, text = found[first] or (False, "")
            raise OtherProcessError(f"process {first}: {text}", is_user_error=is_user_error) from error
        if error is not None:
            raise error

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Around all that processes do together: the first that fails reports why, and the others end silently.

        They end within seconds, also where they wait in an exchange that will never come to its end, as NCCL's don't
        when a process is gone: a thread looks out for failures, aborts what waits, and in the end the process.
        """
        is_left = threading.Event()
        if self.store is not None:
            threading.Thread(target=self._watch_failures, args=(is_left,), daemon=True).start()
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
        finally:
            is_left.set()
            if _State.has_failed:
                _abort_groups()

    def _watch_failures(self, is_left: threading.Event) -> None:
        """End this process if another one has failed and it does not end by itself."""
        kind = None
        while kind is None:
            if is_left.wait(WATCH_SECONDS):
                return
            try:
                if self.store.check([FAILURE_KIND_KEY]):
                    kind = self.store.get(FAILURE_KIND_KEY).decode()
            except RuntimeError:  # the process that holds the store has ended
                return
        if kind == "interrupt" or is_left.wait(GRACE_SECONDS):  # after an interrupt all stop by themselves
            return
        _abort_groups()
        if not is_left.wait(GRACE_SECONDS):
            os._exit(2 if kind == "user" else 1)

    def _note_failure(self, kind: str) -> str | None:
        """The kind of an earlier failure of another process; None: this is the first."""
        if self.store is None:
            return None
        try:
            if self.store.add(FAILURES_KEY, 1) == 1:
                self.store.set(FAILURE_KIND_KEY, kind)
                return None
            self.store.wait([FAILURE_KIND_KEY], STORE_TIMEOUT)
            return self.store.get(FAILURE_KIND_KEY).decode()
        except RuntimeError:  # the process that holds the store has ended
            return "other"


ALONE = Processes()
"""The one process of a command that no launcher started."""


class _State:
    processes: Processes | None = None
    has_failed = False


def _abort_groups() -> None:
    """Break off the exchanges that NCCL waits in; those of gloo fail by themselves when a process ends."""
    if dist.is_initialized() and torch.cuda.is_available():
        with suppress(Exception):  # whatever it is that can't be broken off, the process is about to end
            dist.distributed_c10d._abort_process_group()


def have_met() -> bool:
    """Whether this process has met the others that the launcher started."""
    return _State.processes is not None


def gather_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; then all processes call this."""
    gather = getattr(tensor, "full_tensor", None)  # a DTensor's; importing the class takes longer than most commands
    return tensor if gather is None else gather()


def start_processes() -> Processes:
    """Join the other processes of the launcher; without one, this process is alone. Repeated calls return the same."""
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
    for option in LAUNCHER_OPTIONS:
        if os.environ.get(f"ACCELERATE_{option.upper()}", "").lower() == "true":
            raise UserError(f"accelerate launch --{option}: choose by train.sharding (ddp or fsdp) instead")
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
    """Destroy the groups while Python still runs.

    A group's threads end with the group; one that drops its last tensor during interpreter shutdown aborts the process.
    So nothing may hold a group any longer. Trainings and their meshes are reference cycles, collected before the groups
    are destroyed: a DDP model that is the last to hold a group would wait for its threads while holding the GIL.
    """
    if not dist.is_initialized() or _State.has_failed:  # after a failure the others may be gone
        return
    _State.processes = None
    gc.collect()
    dist.destroy_process_group()
