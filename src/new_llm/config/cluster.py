"""Where the runs of a study are jobs, and what each job asks for."""

import dataclasses
from typing import Annotated, Literal

from pydantic import Field

from new_llm.config.sections import section, short


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
