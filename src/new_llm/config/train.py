"""How a model is trained, and where the runs of a study are jobs of a cluster."""

import dataclasses
from typing import Annotated, Literal

from pydantic import Field

from new_llm.config.sections import section, short


@section
class TrainConfig:
    """The train section of an experiment."""

    num_epochs: Annotated[int, Field(gt=0), short("--epochs")] = 30
    """Passes over the training samples at most. With --resume more of them lengthen a run, a finished one too: steps go
    on counting, and learning rate and curriculum are those of the new length from there on, so that the rate rises
    again to where the longer cosine stands. It is not the run that would have begun with so many epochs. What patience
    has stopped goes on with more patience."""
    stop_at: Literal["epochs", "cpu_seconds"] = "epochs"
    """When training ends: after num_epochs, or once it has taken cpu_seconds, in as many passes as they allow; the
    learning rate then falls with the seconds that are left, and a curriculum is over after num_epochs."""
    cpu_seconds: Annotated[float, Field(gt=0)] = 600.0
    """With stop_at: cpu_seconds, the processor seconds that training may take: of all cores and processes, those before
    a resumption included, without validation."""
    patience: Annotated[int, Field(ge=0)] = 1
    """Epochs without a better validation loss before training stops; 0: never stop early."""
    batch_size: Annotated[int, Field(gt=0), short("--batch-size")] = 8
    """Samples in a batch (rows), those of all processes together."""
    gradient_accumulation_steps: Annotated[int, Field(gt=0)] = 1
    """Batches summed into one optimizer step."""
    learning_rate: Annotated[float, Field(gt=0), short("--lr")] = 1e-4
    """Peak learning rate of everything but the gates."""
    gate_learning_rate: Annotated[float, Field(gt=0)] = 1e-2
    """Peak learning rate of the memory gates and bank weights, which hardly move at the model's."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """AdamW's decay of weight matrices; gates, norms and biases have none."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the gradients' running mean."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the gradients' running square."""
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's divisor floor."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this norm."""
    answer_weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight in the training loss of the tokens that a planted fact lets one know (`data.planted_facts`), a few in a
    hundred; all others weigh 1. The sum is still divided by the number of tokens."""
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the first epoch's steps over which the learning rate rises."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """The cosine ends at this share of the peak."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast where the machine computes in it, else fp32."""
    sharding: Literal["ddp", "fsdp"] = "ddp"
    """With several processes. ddp: each holds all weights; fsdp: each holds a share of weights, gradients and optimizer
    state, and gathers a layer's weights when it runs."""
    compile: bool | None = None
    """torch.compile the layers, which takes a minute or more at the start; None: on a GPU. On a CPU no gain was
    measured."""
    gradient_checkpointing: bool = False
    """Keep only what enters each layer and run it once more in backward: less memory, more time, equal gradients."""
    prefetch_batches: Annotated[int, Field(ge=0)] = 2
    """Batches that a thread makes ahead; 0: none."""
    log_every_steps: Annotated[int, Field(gt=0)] = 10
    """Optimizer steps between two lines of metrics.jsonl; a GPU's losses are read only as often."""
    trackers: tuple[Literal["wandb", "mlflow", "trackio"], ...] = ()
    """Trackers that metrics go to, beside metrics.jsonl and TensorBoard; each is a package to install."""
    checkpoint_every_steps: Annotated[int, Field(gt=0)] = 500
    """Optimizer steps between two checkpoints; one is also written after every epoch."""
    keep_checkpoints: Annotated[int, Field(gt=0)] = 2
    """Checkpoints that are kept while a model trains, the last one and those before it: where the last one turns out to
    be damaged, --resume goes on from the one before."""
    keep_last_checkpoint: bool = True
    """Keep the last checkpoint of a finished model, about thrice its weights: --resume --epochs N goes on from it."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a loss or gradient that is not finite does: stop training, or skip the step, which then changes neither
    weights, optimizer nor memory. Either way the batch is saved in the model's folder under faults/."""
    max_skipped_steps: Annotated[int, Field(ge=0)] = 10
    """Steps in a row that may be skipped before training stops."""
    max_saved_faults: Annotated[int, Field(ge=0)] = 20
    """Steps with a fault whose batch and norms are saved; later ones only leave a line in metrics.jsonl."""
    spike_window: Annotated[int, Field(ge=0)] = 50
    """Steps whose losses a step's loss is compared with, to warn of a spike; 0: no warning."""
    spike_threshold: Annotated[float, Field(gt=0)] = 8.0
    """A spike is so many robust standard deviations (1.4826 median absolute deviations) above the window's median."""
    spike_min_deviation: Annotated[float, Field(gt=0)] = 0.02
    """The least that a robust standard deviation is taken for, nats a token."""
    deterministic: Annotated[bool, short("--deterministic")] = False
    """Only algorithms that give the same bits every time: two runs on one machine with as many threads are equal."""


@section
class ClusterConfig:
    """The cluster section of a study: submitit submits each run as a job. What is not given is the cluster's to say."""

    executor: Annotated[Literal["slurm", "local"] | None, short("--cluster")] = None
    """slurm; or local, which starts the same jobs on this machine, to try them out. None: no cluster."""
    partition: str | None = None
    """SLURM's partition."""
    account: str | None = None
    """SLURM's account."""
    timeout_minutes: Annotated[int, Field(gt=0)] | None = None
    """Minutes that a job may take; None: 1,440. A job that reaches them is queued again and continues from its run's
    last checkpoint (train.checkpoint_every_steps)."""
    max_timeouts: Annotated[int, Field(ge=0)] | None = None
    """How often a job may reach its time limit before its run counts as failed; None: 10."""
    memory_gb: Annotated[float, Field(gt=0)] | None = None
    """Memory of a job."""
    cpus_per_task: Annotated[int, Field(gt=0)] | None = None
    """Processor cores of a job."""
    gpus_per_node: Annotated[int, Field(ge=0)] | None = None
    """GPUs of a job; a run uses one."""
    setup: tuple[str, ...] = ()
    """Shell commands at the start of a SLURM job, e.g. "module load cuda"."""
    options: dict[str, str | int] = dataclasses.field(default_factory=dict)
    """Other options of sbatch by name, e.g. {qos: long}."""
