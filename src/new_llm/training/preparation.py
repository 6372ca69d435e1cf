"""From a model on the CPU to what a step of training calls, on one process or several."""

import warnings
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from new_llm.config import TrainConfig
from new_llm.config.allocator import keep_freed_memory
from new_llm.models import TransformerLM
from new_llm.models.ops.kernels import native
from new_llm.processes import Processes
from new_llm.training.optimizer import make_optimizer
from new_llm.training.sharding import shard_weights
from new_llm.training.trackers import choose_trackers


class TotalLoss(nn.Module):
    """A batch to its summed loss: what is wrapped, so that the wrapper's forward is the model's."""

    def __init__(self, model: TransformerLM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None,
        label_weights: Tensor | None,
        update_memory: bool,
    ) -> Tensor:
        """Summed nats of a batch, each label's times its weight."""
        return self.model.total_loss(
            input_ids, labels, attention_mask, label_weights=label_weights, update_memory=update_memory
        )


@dataclass
class PreparedTraining:
    """What a step calls.

    Attributes:
        accelerator: Accelerate's.
        total_loss: `TotalLoss` in the run's precision; with several processes under DDP, or its weights shared out.
        optimizer: over the model's weights as they are held.
        structure: of the model, where its weights are shared out.
    """

    accelerator: Accelerator
    total_loss: nn.Module
    optimizer: AcceleratedOptimizer
    structure: dict[str, Any] | None


def prepare_training(
    model: TransformerLM, config: TrainConfig, device: torch.device, precision: str, processes: Processes
) -> PreparedTraining:
    """Move the model to its device and wrap it as the configuration says.

    Raises:
        UserError: the weights can't be shared out.
    """
    AcceleratorState._reset_state(True)  # Accelerate allows one precision a process unless it is told to begin anew
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="bf16" if precision == "bf16" else "no",
        log_with=choose_trackers(config.trackers) or None,
        # Samples of one segment write no memory that is read: what only writes has no gradient then.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=bool(model.memory_layers))],
    )
    model.to(accelerator.device)
    model.gradient_checkpointing = config.gradient_checkpointing
    if device.type == "cpu":
        keep_freed_memory()
    if config.compile:
        native.load_kernels()  # which compiled layers can't do themselves
        for layer in model.layers:
            layer.compile()
    # DDP's advice for models all of whose weights had a gradient in their first step; in another they may not.
    warnings.filterwarnings("ignore", message=r"find_unused_parameters=True was specified")
    total_loss = TotalLoss(model)
    structure = None
    if config.sharding == "fsdp" and processes.count > 1:
        structure = shard_weights(total_loss, model, accelerator.device, processes)
    optimizer = make_optimizer(model, config)
    # In evaluation mode Accelerate sets the precision alone; else it adds DDP where there are several processes.
    is_sharded = structure is not None
    wrapped = accelerator.prepare_model(total_loss, device_placement=False, evaluation_mode=is_sharded)
    prepared = cast(AcceleratedOptimizer, accelerator.prepare_optimizer(optimizer))
    return PreparedTraining(accelerator, wrapped, prepared, structure)
