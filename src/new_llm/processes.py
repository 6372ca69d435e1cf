"""Distributed training: this process's rank, and how processes exchange values and errors.

A launcher (`torchrun`, `accelerate launch`, `srun`) starts the same command several times with RANK and WORLD_SIZE set.
Messages always use gloo on the CPU, even if gradients use NCCL. Their timeout is long, because one process may tokenize
for hours while the others wait.
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
import torch.distributed.nn  # before the group is initialised: its functions bind the default group when imported
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from new_llm.config.errors import OtherProcessError, UserError

Value = TypeVar("Value")

HOST_TIMEOUT = datetime.timedelta(days=14)
"""How long a process waits while another works alone."""
FAILURES_KEY, FAILURE_KIND_KEY = "failures", "failure_kind"
USER_ERRORS = (UserError, OSError)
"""Errors that the command reports in one line, with the exit code for bad input."""
STORE_TIMEOUT = datetime.timedelta(seconds=10)
WATCH_SECONDS, GRACE_SECONDS = 1.0, 5.0
"""How often a process checks whether another has failed, and how long it may then take to exit by itself."""
LAUNCHER_OPTIONS = ("use_fsdp", "use_deepspeed", "use_megatron_lm")
"""Options of `accelerate launch` that would wrap the model a second time."""


@dataclass(frozen=True)
class Processes:
    """This process and its group. All processes must call the same methods in the same order.

    Attributes:
        rank: 0 is the main process, the only one that writes files.
        count: the world size.
        group: the gloo group for messages; None in a single process.
        store: the key-value store through which processes report failures, if any.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    group: Any = None
    store: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and shows progress."""
        return self.rank == 0

    def place(self, device: torch.device) -> torch.device:
        """Return this process's own GPU, by its local rank or, if it sees only one, that; two can't share one."""
        if device.type != "cuda" or self.count == 1:
            return device
        own = torch.device("cuda", self.local_rank if self.local_rank < torch.cuda.device_count() else 0)
        name = socket.gethostname(), str(torch.cuda.get_device_properties(own).uuid)
        if self.gather(name).count(name) > 1:
            raise UserError(
                f"process {self.rank} is number {self.local_rank + 1} on its machine, sees "
                f"{torch.cuda.device_count()} GPUs and would share one with another process: start one process per "
                "GPU, or pass --device cpu"
            )
        torch.cuda.set_device(own)
        os.environ["LOCAL_RANK"] = str(own.index)  # Accelerate reads its device from here
        return own

    def slice_rows(self, num_rows: int) -> slice:
        """Return the rows of a batch that this process reads: equal contiguous shares in rank order."""
        if num_rows % self.count:
            raise UserError(
                f"train.batch_size: {num_rows} can't be divided among {self.count} processes; the total over all "
                f"processes must be a multiple of {self.count}"
            )
        own = num_rows // self.count
        return slice(self.rank * own, (self.rank + 1) * own)

    def gather(self, value: Value) -> list[Value]:
        """Return all processes' values in rank order."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self.group)
        return values

    def share(self, value: Value) -> Value:
        """Broadcast the main process's value."""
        if self.count == 1:
            return value
        values: list[Any] = [value if self.is_main else None]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def sum(self, values: NDArray[Any]) -> NDArray[Any]:
        """Sum over processes, in the dtype of the values."""
        if self.count == 1:
            return values
        total = torch.from_numpy(np.ascontiguousarray(values).copy())
        dist.all_reduce(total, group=self.group)
        return total.numpy()

    def any(self, value: bool) -> bool:
        """Whether `value` is true on any process."""
        return bool(self.sum(np.array([value], dtype=np.int64))[0])

    def sum_on_device(self, tensor: Tensor) -> Tensor:
        """Sum a small tensor over processes, in place; on a GPU without synchronising."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def run_on_main(self, work: Callable[[], Value]) -> Value:
        """Run work on the main process and return its result on all; the others get its error as OtherProcessError."""
        with self.agree():
            result: Any = work() if self.is_main else None
        return self.share(result)

    def run_main_first(self, work: Callable[[], Value]) -> Value:
        """Run work on the main process, then on the others, so that they find the files it wrote, e.g. a cache."""
        result: Any = None
        for is_turn in (self.is_main, not self.is_main):
            with self.agree():
                if is_turn:
                    result = work()
        return result

    @contextmanager
    def agree(self) -> Iterator[None]:
        """Wait for all processes at the end of the block; an error in one raises OtherProcessError in all others."""
        error = None
        try:
            yield
        except OtherProcessError:
            raise  # all processes know of it already
        except Exception as caught:
            error = caught
        found = self.gather(error and (isinstance(error, USER_ERRORS), str(error)))
        first = next((rank for rank, entry in enumerate(found) if entry), self.rank)
        if first != self.rank:  # only the lowest rank that failed reports its error
            is_user_error, text = found[first] or (False, "")
            raise OtherProcessError(f"process {first}: {text}", is_user_error=is_user_error) from error
        if error is not None:
            raise error

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Wrap all joint work: the first process that fails reports the error, and the others exit silently.

        They exit within seconds, even from a collective that would hang, as NCCL's do when a process is gone: a thread
        watches for failures, aborts the process groups and, if that does not help, exits the process.
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
        """Exit this process if another has failed and this one does not stop by itself."""
        kind = None
        while kind is None:
            if is_left.wait(WATCH_SECONDS):
                return
            try:
                if self.store.check([FAILURE_KIND_KEY]):
                    kind = self.store.get(FAILURE_KIND_KEY).decode()
            except RuntimeError:  # the process that hosts the store has exited
                return
        if kind == "interrupt" or is_left.wait(GRACE_SECONDS):  # an interrupt reaches all processes
            return
        _abort_groups()
        if not is_left.wait(GRACE_SECONDS):
            os._exit(2 if kind == "user" else 1)

    def _note_failure(self, kind: str) -> str | None:
        """Report a failure; return the kind of the failure that came first in another process, or None."""
        if self.store is None:
            return None
        try:
            if self.store.add(FAILURES_KEY, 1) == 1:
                self.store.set(FAILURE_KIND_KEY, kind)
                return None
            self.store.wait([FAILURE_KIND_KEY], STORE_TIMEOUT)
            return self.store.get(FAILURE_KIND_KEY).decode()
        except RuntimeError:  # the process that hosts the store has exited
            return "other"


ALONE = Processes()
"""The single process of a command run without a launcher."""


class _State:
    processes: Processes | None = None
    has_failed = False


def _abort_groups() -> None:
    """Abort pending NCCL collectives; gloo's fail by themselves when a process exits."""
    if dist.is_initialized() and torch.cuda.is_available():
        with suppress(Exception):  # the process is about to exit anyway
            dist.distributed_c10d._abort_process_group()


def have_met() -> bool:
    """Whether `start_processes` has initialised the group."""
    return _State.processes is not None


def gather_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor. If it is sharded, all processes must call this."""
    gather = getattr(tensor, "full_tensor", None)  # only DTensor has it; importing that class is slow
    return tensor if gather is None else gather()


def start_processes() -> Processes:
    """Initialise the process group of the launcher, once; without a launcher return `ALONE`."""
    if _State.processes is not None:
        return _State.processes
    count = int(os.environ.get("WORLD_SIZE") or 1)
    if count == 1:
        return ALONE
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing or os.environ["MASTER_PORT"] == "0":
        raise UserError(
            f"WORLD_SIZE is {count}, but {', '.join(missing or ['MASTER_PORT'])} is not set: start with "
            "torchrun --standalone or accelerate launch"
        )
    for option in LAUNCHER_OPTIONS:
        if os.environ.get(f"ACCELERATE_{option.upper()}", "").lower() == "true":
            raise UserError(f"accelerate launch --{option} is not supported: set train.sharding (ddp or fsdp) instead")
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
    """Destroy the process groups before the interpreter shuts down.

    A group's threads live as long as the group, and a thread that drops its last tensor during interpreter shutdown
    aborts the process. Trainings and their meshes are reference cycles that hold groups. They are collected first,
    because a DDP model that holds the last reference would wait for the group's threads while holding the GIL.
    """
    if not dist.is_initialized() or _State.has_failed:  # after a failure the other processes may be gone
        return
    _State.processes = None
    gc.collect()
    dist.destroy_process_group()
