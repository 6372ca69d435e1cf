"""From a model on the CPU to what a training step calls, in one process or several: DDP, or FSDP2's shares."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from new_llm.config import TrainConfig, UserError
from new_llm.config.allocator import keep_freed_memory
from new_llm.data.batches import Batch
from new_llm.models import TransformerLM
from new_llm.models.model_file import build_model, describe_model
from new_llm.models.ops.kernels import native
from new_llm.processes import Processes, gather_tensor
from new_llm.training.optimizer import make_optimizer

LossFunction = Callable[[TransformerLM, Batch], Tensor]
"""A batch's loss, summed over its predicted tokens: a step divides by the tokens of all its batches and processes."""


class BatchLoss(nn.Module):
    """A loss function as a module, so that wrappers of the model (DDP, autocast, FSDP) wrap the whole loss."""

    def __init__(self, model: TransformerLM, loss_fn: LossFunction) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, batch: Batch) -> Tensor:
        """The summed loss of a batch."""
        return self.loss_fn(self.model, batch)


@dataclass
class PreparedTraining:
    """What a step calls.

    Attributes:
        accelerator: Accelerate's.
        batch_loss: `BatchLoss` in the training's precision, wrapped for several processes where there are several.
        optimizer: over the model's weights as they are held.
        structure: of the model, where its weights are sharded; None: they are not.
    """

    accelerator: Accelerator
    batch_loss: nn.Module
    optimizer: AcceleratedOptimizer
    structure: dict[str, Any] | None


def prepare_training(
    model: TransformerLM,
    loss_fn: LossFunction,
    config: TrainConfig,
    device: torch.device,
    precision: str,
    processes: Processes,
) -> PreparedTraining:
    """Move the model to its device and wrap it as the configuration says.

    Raises:
        UserError: the weights can't be sharded.
    """
    AcceleratorState._reset_state(True)  # Accelerate allows one precision per process unless it is told to begin anew
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="bf16" if precision == "bf16" else "no",
        log_with=list(config.trackers) or None,
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
    # DDP's advice for models all of whose weights had a gradient in the first step; in a later one they may not.
    warnings.filterwarnings("ignore", message=r"find_unused_parameters=True was specified")
    batch_loss = BatchLoss(model, loss_fn)
    structure = None
    if config.sharding == "fsdp" and processes.count > 1:
        structure = shard_weights(batch_loss, model, accelerator.device, processes)
    optimizer = make_optimizer(model, config)
    # In evaluation mode Accelerate sets the precision alone; else it adds DDP where there are several processes.
    wrapped = accelerator.prepare_model(batch_loss, device_placement=False, evaluation_mode=structure is not None)
    prepared = cast(AcceleratedOptimizer, accelerator.prepare_optimizer(optimizer))
    return PreparedTraining(accelerator, wrapped, prepared, structure)


def shard_weights(root: nn.Module, model: TransformerLM, device: torch.device, processes: Processes) -> dict[str, Any]:
    """Leave this process its share of every weight, layer by layer: FSDP2's `fully_shard`.

    A layer's weights are gathered when it runs and freed after it. Embedding, head and whatever else is outside the
    layers belong to the root, which gathers them for the whole step: the fused loss reads the head's weights directly.

    Args:
        root: the module that training calls, with the model in it.
        model: the model.
        device: where it is.
        processes: those that share it.

    Returns:
        The model's structure, from which `gather_model` rebuilds it.

    Raises:
        UserError: the model has a weight that is a single number, as α of a parallel adapter, which can't be sharded,
            or its head is its embedding.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    scalars = [name for name, parameter in model.named_parameters() if parameter.dim() == 0]
    if scalars:
        raise UserError(f"train.sharding fsdp: {scalars[0]} is a single number, which can't be sharded; use ddp")
    if model.tie_word_embeddings:
        raise UserError("train.sharding fsdp: tied embeddings can't be sharded; use ddp, or tie_word_embeddings false")
    structure = describe_model(model)  # now: a layer whose weights are sharded is of another class
    # Parts of a layer's memory are views; nothing changes a memory in place, which is what the warning is about.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (processes.count,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(root, mesh=mesh)
    return structure


def gather_model(model: TransformerLM, structure: dict[str, Any] | None) -> TransformerLM:
    """The model with all its weights. All processes call this.

    Args:
        model: the model.
        structure: what `shard_weights` returned, for a copy with all weights; None: the model itself, not sharded.
    """
    if structure is None:
        return model
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[]):  # the copy's first weights are drawn and replaced
        whole = build_model(structure, "the model in training").to(device)
    whole.load_state_dict({name: gather_tensor(tensor.detach()) for name, tensor in model.state_dict().items()})
    return whole.train(model.training)
