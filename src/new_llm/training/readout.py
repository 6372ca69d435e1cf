"""Losses and gradient norms of steps, read out together, so that the host needn't wait for a GPU in every step."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer


@dataclass(frozen=True)
class StepFacts:
    """What is known of an optimizer step.

    Attributes:
        loss: mean nats of its tokens.
        grad_norm: of all gradients, before clipping.
        num_tokens: predicted tokens.
        step: its number, from 1.
        epoch: its epoch, from 1.
        batch: batches of the epoch before it.
    """

    loss: float
    grad_norm: float
    num_tokens: int
    step: int
    epoch: int
    batch: int


class StepReadout:
    """Keeps steps' numbers on the device until they are asked for.

    A loss or gradient that is not finite makes that step's update a no-op on the device itself, by fused AdamW's own
    switch, so that nobody waits for it. Where faults stop training, every later update is one too: whenever the fault
    is read, the weights and the optimizer are as they were before the step.

    Args:
        optimizer: fused AdamW.
        device: where the losses are.
        every_steps: steps after which the numbers are to be read; 1: each before its update.
        skips_faults: a fault costs its own step alone.
        add_up: the sum of a tensor over the processes; the loss is of all of them, as the gradients' norm is already.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        device: torch.device,
        *,
        every_steps: int,
        skips_faults: bool = False,
        add_up: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        self.optimizer = optimizer
        self.every_steps = every_steps
        self.skips_faults = skips_faults
        self.add_up = add_up
        self.has_failed = torch.zeros((), dtype=torch.bool, device=device)
        """Whether the last step's update is a no-op, on the device."""
        self._numbers: list[Tensor] = []
        self._places: list[tuple[int, int, int, int]] = []

    def add(self, losses: list[Tensor], norm: Tensor, num_tokens: int, step: int, epoch: int, batch: int) -> bool:
        """Keep a step's numbers, before its update; whether it is time to read.

        Args:
            losses: its batches' shares of the mean loss, as far as they are this process's.
            norm: of its gradients.
            num_tokens: see `StepFacts`, as the rest.
            step: its number.
            epoch: its epoch.
            batch: batches before it.
        """
        loss = self.add_up(torch.stack(losses).double().sum())
        numbers = torch.stack([loss, norm.detach().double()])
        self._numbers.append(numbers)
        self._places.append((num_tokens, step, epoch, batch))
        has_failed = ~numbers.isfinite().all()
        self.has_failed = has_failed if self.skips_faults else self.has_failed | has_failed
        self.optimizer.found_inf = self.has_failed.float()  # pyright: ignore[reportAttributeAccessIssue]
        return len(self._numbers) >= self.every_steps

    def take(self) -> list[StepFacts]:
        """The steps since the last call, oldest first. This waits for the device."""
        if not self._numbers:
            return []
        values = torch.stack(self._numbers).tolist()
        pairs = zip(values, self._places, strict=True)
        facts = [StepFacts(loss, norm, *place) for (loss, norm), place in pairs]
        self._numbers, self._places = [], []
        return facts
