"""AdamW with a group for each kind of parameter, and its schedule."""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from new_llm.config import TrainConfig
from new_llm.models.layers import Layer


def group_parameters(model: nn.Module, config: TrainConfig) -> list[dict[str, object]]:
    """Three groups: weight matrices (decayed); norms, biases and expansion gates (not decayed); memory gates, bank
    weights and the α of adapters (not decayed, their own learning rate).
    """
    gates = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, Layer)
        for parameter in module.gate_parameters()
    }
    undecayed = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, Layer)
        for parameter in module.undecayed_parameters()
    }
    groups: dict[str, list[nn.Parameter]] = {"decayed": [], "undecayed": [], "gates": []}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in gates:
            groups["gates"].append(parameter)
        elif parameter.dim() < 2 or id(parameter) in undecayed:
            groups["undecayed"].append(parameter)
        else:
            groups["decayed"].append(parameter)
    rates = {"gates": config.gate_learning_rate}
    return [
        {
            "params": parameters,
            "name": name,
            "lr": rates.get(name, config.learning_rate),
            "weight_decay": config.weight_decay if name == "decayed" else 0.0,
        }
        for name, parameters in groups.items()
        if parameters
    ]


def make_optimizer(model: nn.Module, config: TrainConfig) -> AdamW:
    """Fused AdamW over `group_parameters`."""
    return AdamW(
        group_parameters(model, config),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )


def make_schedule(config: TrainConfig, steps_per_epoch: int) -> Callable[[int], float]:
    """Share of the peak learning rate at a step: a linear rise, then a half cosine down to `min_lr_ratio`."""
    warmup_steps = max(1, round(config.warmup_fraction * steps_per_epoch))
    total_steps = steps_per_epoch * config.num_epochs

    def share(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

    return share


def make_scheduler(optimizer: torch.optim.Optimizer, config: TrainConfig, steps_per_epoch: int) -> LambdaLR:
    """The schedule applied to every group."""
    return LambdaLR(optimizer, make_schedule(config, steps_per_epoch))
