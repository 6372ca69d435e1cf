"""What a training is at a step, gathered from its processes and given back to them, however many there are.

Weights and optimizer state are whole and go by the parameters' names; the memory has all rows of the batch, in order.
So what one number of processes has saved another goes on with, whichever way it shares the weights.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from new_llm.models import TransformerLM
from new_llm.models.held_memory import entry_is_per_row
from new_llm.processes import Processes, gather_tensor
from new_llm.training.random_states import read_random_states, set_random_states
from new_llm.training.sharding import place_like

SHARED_BY_ROWS = "frozen"
"""The one tensor of a layer's memory that has no row dimension when the memory has one."""


@dataclass
class GatheredState:
    """Whole values, on the CPU.

    Attributes:
        weights: by name.
        optimizer: tensors and numbers of each parameter, by its name and then theirs.
        optimizer_groups: settings of the optimizer's groups; `params` are names.
        scheduler: its state.
        memory: of `get_memory_state`, with all rows.
        memory_rows: how many; None: one memory is shared by all rows.
        random_states: of the main process's generators.
    """

    weights: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]
    optimizer_groups: list[dict[str, Any]]
    scheduler: dict[str, Any]
    memory: dict[int, dict[str, Any]]
    memory_rows: int | None
    random_states: dict[str, Any]


def gather_state(
    model: TransformerLM, optimizer: Optimizer, scheduler: LRScheduler, processes: Processes
) -> GatheredState | None:
    """All of a training's tensors, on the main process; on the others None. All processes call this."""

    def keep(tensor: Tensor) -> Tensor:
        whole = gather_tensor(tensor.detach())
        return whole.contiguous().cpu() if processes.is_main else whole.new_empty(0)

    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    weights = {name: keep(tensor) for name, tensor in model.state_dict().items()}
    values = {
        names[parameter]: {key: keep(value) for key, value in entry.items()}
        for parameter, entry in optimizer.state.items()
    }
    groups = [
        group | {"params": [names[parameter] for parameter in group["params"]]} for group in optimizer.param_groups
    ]
    rows = model.memory_rows
    memories = processes.gather_on_main(model.get_memory_state()) if rows else [model.get_memory_state()]
    if not processes.is_main:
        return None
    return GatheredState(
        weights=weights,
        optimizer=values,
        optimizer_groups=groups,
        scheduler=scheduler.state_dict(),
        memory=concatenate_rows(memories),
        memory_rows=rows and rows * processes.count,
        random_states=read_random_states(),
    )


def check_state(state: GatheredState, model: TransformerLM, optimizer: Optimizer) -> None:
    """Refuse the state of another model, or of another optimizer.

    Raises:
        ValueError: says what differs.
    """
    expected, found = ({name: tuple(t.shape) for name, t in s.items()} for s in (model.state_dict(), state.weights))
    if expected != found:
        odd = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
        raise ValueError(f"it is another model's: {odd[0]} is {found.get(odd[0])}, here {expected.get(odd[0])}")
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = {group["name"]: {names[p] for p in group["params"]} for group in optimizer.param_groups}
    if {group["name"]: set(group["params"]) for group in state.optimizer_groups} != groups:
        raise ValueError("its optimizer's groups hold other weights")


@torch.no_grad()
def restore_state(
    state: GatheredState | None,
    model: TransformerLM,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    processes: Processes,
) -> None:
    """Give every process its part of the main process's state. All processes call this; the others give None."""
    held = model.state_dict()
    for name, tensor in processes.share_tensors({} if state is None else state.weights):
        held[name].copy_(place_like(tensor, held[name]))
    _restore_optimizer(state, model, optimizer, processes)
    rest = None if state is None else (state.scheduler, state.memory, state.memory_rows, state.random_states)
    schedule, memory, rows, random_states = cast(Any, processes.share(rest))
    scheduler.load_state_dict(schedule)
    own = processes.slice_rows(rows) if rows else slice(None)
    model.reset_memory(rows and own.stop - own.start)
    if memory:  # a model without memory has rows all the same
        model.set_memory_state({index: take_rows(entry, own) for index, entry in memory.items()})
    set_random_states(random_states)


def _restore_optimizer(
    state: GatheredState | None, model: TransformerLM, optimizer: Optimizer, processes: Processes
) -> None:
    parameters = dict(model.named_parameters())
    names = {parameter: name for name, parameter in parameters.items()}
    numbers: dict[str, int] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            numbers[names[parameter]] = len(numbers)
    flat = (
        {}
        if state is None
        else {f"{key} {name}": value for name, entry in state.optimizer.items() for key, value in entry.items()}
    )
    entries: dict[int, dict[str, Tensor]] = {}
    for place, tensor in processes.share_tensors(flat):
        key, name = place.split(" ", 1)
        like = parameters[name]  # a running mean has the parameter's shape; the number of steps is one number
        entries.setdefault(numbers[name], {})[key] = place_like(tensor, like) if tensor.shape == like.shape else tensor
    settings = processes.share({} if state is None else {group["name"]: group for group in state.optimizer_groups})
    groups = [
        settings[group["name"]] | {"params": [numbers[names[parameter]] for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]
    optimizer.load_state_dict({"state": entries, "param_groups": groups})


def concatenate_rows(states: list[dict[int, dict[str, Any]]]) -> dict[int, dict[str, Any]]:
    """The memories of processes, each with its own rows, as one with all rows."""
    if len(states) == 1:
        return states[0]
    return {
        index: {
            key: torch.cat([state[index][key] for state in states]) if _has_rows(entry, key) else value
            for key, value in entry.items()
        }
        for index, entry in states[0].items()
    }


def take_rows(entry: dict[str, Any], rows: slice) -> dict[str, Any]:
    """Some rows of a layer's memory; all of it where the rows share one."""
    return {key: value[rows] if _has_rows(entry, key) else value for key, value in entry.items()}


def _has_rows(entry: dict[str, Any], key: str) -> bool:
    return entry_is_per_row(entry) and isinstance(entry[key], Tensor) and key != SHARED_BY_ROWS
