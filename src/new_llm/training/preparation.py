"""Preparation for training: the wrapped model (plain, DDP or FSDP2), the optimizer, and prefetched batches."""

import itertools
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils._triton import has_triton

from new_llm.config import TrainConfig, UserError
from new_llm.config.allocator import keep_freed_memory
from new_llm.data.batches import Batch, BatchPlan, JoinedPlan
from new_llm.models import TransformerLM
from new_llm.models.layers import Layer
from new_llm.models.model_file import build_model, describe_model
from new_llm.models.ops.kernels import native
from new_llm.models.state import map_tensors
from new_llm.processes import Processes
from new_llm.training.checkpoint import share_weights

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

LossFunction = Callable[[TransformerLM, Batch], Tensor]
"""A batch's loss, summed over its predicted tokens; the step divides by the tokens of all its batches and processes."""


class BatchLoss(nn.Module):
    """A loss function as a module, so that DDP, autocast and FSDP wrap the loss together with the model."""

    def __init__(self, model: TransformerLM, loss_fn: LossFunction) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, batch: Batch) -> Tensor:
        """The summed loss of a batch."""
        return self.loss_fn(self.model, batch)

    def token_losses(self, *args: Any, **options: Any) -> Tensor:
        """Call the model's `token_losses` through this module, the FSDP root, which gathers embedding and head."""
        return self.model.token_losses(*args, **options)


class PreparedTraining(NamedTuple):
    """What a training step uses. `structure` describes a sharded model (see `shard_weights`); else it is None."""

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
    """Move the model to its device and wrap it as configured. Raise a `UserError` if its weights can't be sharded.

    A model to be sharded is never whole on any device. On processes other than the main one it may be on `meta`.
    """
    is_sharded = config.sharding == "fsdp" and processes.count > 1
    finds_unused = processes.count > 1 and not is_sharded and has_unused_parameters(model, loss_fn)
    AcceleratorState._reset_state(True)  # without it, Accelerate insists on one precision per process
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="bf16" if precision == "bf16" else "no",
        log_with=list(config.trackers) or None,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=finds_unused)],
    )
    if not is_sharded:
        model.to(accelerator.device)
    model.gradient_checkpointing = config.gradient_checkpointing
    if device.type == "cpu":
        keep_freed_memory()
    if config.compile or (config.compile is None and accelerator.device.type == "cuda" and has_triton()):
        native.load_kernels()  # compiled layers can't load the kernels themselves
        for layer in model.layers:
            layer.compile()
    # DDP warns that the option is needless if all weights have gradients in the first step; later some may not.
    warnings.filterwarnings("ignore", message=r"find_unused_parameters=True was specified")
    batch_loss = BatchLoss(model, loss_fn)
    structure = None
    if is_sharded:
        structure = shard_weights(batch_loss, model, accelerator.device, precision, processes)
    optimizer = make_optimizer(model, config)
    # In evaluation mode Accelerate only sets the precision; otherwise it adds DDP for several processes.
    wrapped = accelerator.prepare_model(batch_loss, device_placement=False, evaluation_mode=structure is not None)
    prepared = cast(AcceleratedOptimizer, accelerator.prepare_optimizer(optimizer))
    return PreparedTraining(accelerator, wrapped, prepared, structure)


def has_unused_parameters(model: TransformerLM, loss_fn: LossFunction) -> bool:
    """Return whether a sample may give a trained parameter no gradient, so that DDP must search for it (which is slow).

    The test is one segment from an empty memory, which uses the fewest parameters: nothing reads what it writes.
    """
    ids, was_training = torch.zeros(1, 2, dtype=torch.int64), model.training
    sample = Batch(ids, F.pad(ids, (0, 1)), None, torch.ones(1, dtype=torch.bool), num_targets=2)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with model.fresh_memory():
        gradients = torch.autograd.grad(loss_fn(model.train(), sample), trained, allow_unused=True)
    model.train(was_training)
    return any(gradient is None for gradient in gradients)


def shard_weights(
    root: nn.Module, model: TransformerLM, device: torch.device, precision: str, processes: Processes
) -> dict[str, Any]:
    """Shard the weights over the processes, layer by layer, with FSDP2's `fully_shard`; return the model's structure.

    The model is moved to `meta`; then each process receives its shard of the main process's weights, which stay on the
    host until then. A layer's weights are gathered when it runs and freed afterwards (see `choose_policy`). All weights
    outside the layers, such as embedding and head, belong to the root, which gathers them in float32 for the whole
    step, because the fused loss reads the head's weights directly.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    scalars = [name for name, parameter in model.named_parameters() if parameter.dim() == 0]
    if scalars:
        raise UserError(f"train.sharding fsdp: {scalars[0]} is a scalar, which can't be sharded; use ddp")
    if model.tie_word_embeddings:
        raise UserError("train.sharding fsdp: tied embeddings can't be sharded; use ddp, or tie_word_embeddings false")
    structure = describe_model(model)  # before sharding, which changes the layers' classes
    weights = model.state_dict() if processes.is_main else {}
    model.to("meta")
    # The warning is about changing views in place; memories are views, but are never changed in place.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (processes.count,))
    policy = choose_policy(precision, device)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(root, mesh=mesh, mp_policy=replace(policy, param_dtype=None))
    model.to_empty(device=device)
    share_weights(weights, model, processes)
    return structure


def choose_policy(precision: str, device: torch.device) -> Any:
    """Choose the dtypes in which a layer's weights are gathered and their gradients are reduced.

    With precision bf16, weights are gathered in bfloat16 on a GPU, but not on a CPU, whose LayerNorm requires weights
    of its input's dtype. Gradients are reduced in float32. Hidden states are not cast, so that the residual stream
    stays float32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    narrow = torch.bfloat16 if precision == "bf16" and device.type == "cuda" else None
    return MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=torch.float32, cast_forward_inputs=False)


def gather_model(model: TransformerLM, structure: dict[str, Any] | None, *, on_host: bool = False) -> TransformerLM:
    """Return the model with all its weights: itself, or an unsharded copy of this `structure` (see `shard_weights`).

    All processes must call this. With `on_host` the copy is on the main process's CPU and has no weights on the other
    processes; no device holds more than one whole tensor at a time.
    """
    if structure is None:
        return model
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict  # slow to import

    with torch.device("meta"):
        whole = build_model(structure, "the model in training")
    options = StateDictOptions(full_state_dict=True, cpu_offload=on_host)
    weights = cast(dict[str, Tensor], get_model_state_dict(model, options=options))
    whole.load_state_dict(weights, assign=True, strict=bool(weights))
    return whole.train(model.training)


class ShardedModel:
    """A sharded model as a `LanguageModel`, for measures to read without gathering all weights at once.

    Each call gathers the weights layer by layer, which all processes must do together. So a process that has finished
    its documents and leaves `fresh_memory` keeps reading a dummy token until all others have finished.
    """

    def __init__(self, prepared: PreparedTraining, model: TransformerLM, processes: Processes) -> None:
        from torch.distributed.fsdp import register_fsdp_forward_method

        self.model = model
        self.processes = processes
        self.batch_loss = cast(BatchLoss, prepared.accelerator.unwrap_model(prepared.batch_loss))
        register_fsdp_forward_method(self.batch_loss, "token_losses")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    @contextmanager
    def fresh_memory(self, batch_size: int | None = None) -> Iterator[None]:
        """Use an empty memory inside the block; at its end, wait for all processes."""
        with self.model.fresh_memory(batch_size):
            yield
        token = torch.zeros(1, 1, dtype=torch.int64, device=next(self.parameters()).device)
        with self.model.fresh_memory():
            while self.processes.any(False):  # True while others still call `token_losses`
                self._read(token, F.pad(token, (0, 1)))
        cast("FSDPModule", self.batch_loss).reshard()  # the root, which stays gathered between calls

    def token_losses(self, input_ids: Tensor, labels: Tensor, *args: Any, **options: Any) -> Tensor:
        """Return the loss in nats of the token after each position, [B, T]."""
        self.processes.any(True)
        return self._read(input_ids, labels, *args, **options)

    def _read(self, *args: Any, **options: Any) -> Tensor:
        # Weights gathered here are reused by the next training step, and autograd can't use inference tensors.
        with torch.inference_mode(False), torch.no_grad():
            return self.batch_loss.token_losses(*args, **options)


# The optimizer


def group_parameters(model: nn.Module, config: TrainConfig) -> list[dict[str, object]]:
    """Group the trainable parameters by weight decay and learning rate.

    Weight matrices are decayed. Norms, biases and `Layer.undecayed_parameters` (e.g. expansion gates) are not. Memory
    gates, bank weights and the α of adapters are not decayed, either, and have their own learning rate.
    """
    layers = [module for module in model.modules() if isinstance(module, Layer)]
    gates = {id(parameter) for layer in layers for parameter in layer.gate_parameters()}
    undecayed = {id(parameter) for layer in layers for parameter in layer.undecayed_parameters()}
    groups: dict[str, list[nn.Parameter]] = {"decayed": [], "undecayed": [], "gates": []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            is_undecayed = parameter.dim() < 2 or id(parameter) in undecayed
            name = "gates" if id(parameter) in gates else "undecayed" if is_undecayed else "decayed"
            groups[name].append(parameter)
    return [
        {
            "params": parameters,
            "name": name,
            "lr": config.gate_learning_rate if name == "gates" else config.learning_rate,
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


def make_schedule(
    config: TrainConfig, steps_per_epoch: int, read_progress: Callable[[], float] | None = None
) -> Callable[[int], float]:
    """Return a function from the step to a factor of the peak learning rate: linear warm-up, then cosine decay.

    f(s) = (s + 1) / W for the W warm-up steps, then r + (1 − r) (1 + cos πp) / 2 with r = `min_lr_ratio` and p from 0
    to 1.

    Args:
        read_progress: returns p, the share of the training that is done; None: the share of the steps after warm-up.
    """
    warmup_steps = max(1, round(config.warmup_fraction * steps_per_epoch))
    total_steps = steps_per_epoch * config.num_epochs

    def share(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        done = read_progress() if read_progress else (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    return share


# Batches


@contextmanager
def prefetch_batches(
    plan: BatchPlan | JoinedPlan, first: int, num_ahead: int, *, pin: bool
) -> Iterator[Iterator[Batch]]:
    """Open an iterator over the plan's batches from `first` on; a thread prepares `num_ahead` batches in advance.

    `pin` puts their tensors into page-locked memory, which a GPU can copy asynchronously.
    """

    def make(number: int) -> Batch:
        return map_tensors(plan[number], Tensor.pin_memory) if pin else plan[number]

    numbers = iter(range(first, len(plan)))
    if num_ahead == 0:
        yield map(make, numbers)
        return
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
    ahead = deque(executor.submit(make, number) for number in itertools.islice(numbers, num_ahead))

    def take() -> Iterator[Batch]:
        while ahead:
            batch = ahead.popleft().result()
            ahead.extend(executor.submit(make, number) for number in itertools.islice(numbers, 1))
            yield batch

    try:
        yield take()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
