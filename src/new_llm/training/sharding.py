"""Weights of which each process holds a share (FSDP2): shared out, gathered, and put back."""

import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn

from new_llm.config import UserError
from new_llm.models import TransformerLM
from new_llm.models.model_file import build_model, describe_model
from new_llm.processes import Processes, gather_tensor


def shard_weights(root: nn.Module, model: TransformerLM, device: torch.device, processes: Processes) -> dict[str, Any]:
    """Leave this process its share of every weight, layer by layer: FSDP2's `fully_shard`.

    A layer's weights are gathered when it runs and given back after it. Embedding, head and what else stands outside
    the layers belong to the root, which gathers them for the whole step: the fused loss reads the head's weights
    themselves.

    Args:
        root: the module that training calls, with the model in it.
        model: the model.
        device: where it lies.
        processes: those that share it.

    Returns:
        The model's structure, from which `gather_model` makes it again.

    Raises:
        UserError: the model has a weight that is a single number, as α of a parallel adapter, which can't be shared, or
            its head is its embedding.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    scalars = [name for name, parameter in model.named_parameters() if parameter.dim() == 0]
    if scalars:
        raise UserError(f"train.sharding fsdp: {scalars[0]} is a single number, which can't be shared out; use ddp")
    if model.tie_word_embeddings:
        raise UserError(
            "train.sharding fsdp: tied embeddings can't be shared out; use ddp, or tie_word_embeddings false"
        )
    structure = describe_model(model)  # now: a layer whose weights are shared out is of another class
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
        structure: what `shard_weights` returned, for a copy with all weights; None: they are not shared out.
    """
    if structure is None:
        return model
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[]):  # the copy's first weights are drawn and replaced
        whole = build_model(structure, "the model in training").to(device)
    whole.load_state_dict({name: gather_tensor(tensor.detach()) for name, tensor in model.state_dict().items()})
    return whole.train(model.training)


def place_like(whole: Tensor, like: Tensor) -> Tensor:
    """Whole values as `like` holds them: on its device and, where it is a share, this process's share of them."""
    whole = whole.to(like.device)
    if not hasattr(like, "full_tensor"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    shared = cast(Any, like)
    return distribute_tensor(whole, shared.device_mesh, shared.placements)
