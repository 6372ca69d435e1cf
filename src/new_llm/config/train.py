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


@section
class DataConfig:
    """The data section of an experiment."""

    source: Annotated[str, short("--train-file")] = "pile"
    """pile, wikitext-2, sotu (the embedded State of the Union addresses), a path (.txt, .jsonl, .parquet, WikiText's
    .raw or .tokens, also packed as .gz, .zst or .xz; or a folder of such files), `hub:owner/name[:config][:field]` for
    any data set of the hub, or my_module:function for a source of your own. Several are mixed by
    their weights, `sotu*0.7+my_text.txt*0.3`: shares of the text, until one of them is used up."""
    validation_source: Annotated[str | None, short("--validation-file")] = None
    """Where all validation documents come from, named as source is; of a data set of the hub, its validation split.
    What training holds of them is left out there. None: a share of the source's own (validation_fraction)."""
    tokenizer: str = "auto"
    """A tokenizer.json file, a hub name, or auto: EleutherAI's where the hub answers and the source is on the hub, else
    a BPE trained on the source's training split."""
    tokenizer_vocab_size: Annotated[int, Field(ge=300)] = 8192
    """Entries of a BPE that is trained here."""
    special_tokens: Literal["text", "control"] = "text"
    """What the tokenizer's special tokens mean where a document spells them, e.g. <|endoftext|>: text encodes them like
    any other text, control as the token itself."""
    text_field: str = "text"
    """The field of a .jsonl, Parquet or hub record that holds the text."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A record without a text (null, a missing field, no JSON, no UTF-8): stop with one line, or skip and count it."""
    split_seed: Annotated[int, Field(ge=0, lt=2**32), short("--split-seed")] = 0
    """Seed of the split into training and validation, and so of a tokenizer that is trained here. It is apart from the
    models' seed, so that runs with several seeds share their data and tokens."""
    num_samples: Annotated[int | None, Field(gt=0), short("--samples")] = 5000
    """Training samples; None: all that the source holds."""
    seq_length: Annotated[int, Field(ge=2), short("--seq-length")] = 256
    """Tokens in a sample, all of one document."""
    segments_per_sample: Annotated[int, Field(gt=0), short("--segments-per-sample")] = 4
    """Segments in a sample; gradients run through all of them."""
    segment_curriculum: tuple[Annotated[int, Field(gt=0)], ...] = ()
    """Segments of a sample in equal shares of all steps, e.g. 1 8: first samples of one segment, from eight times as
    many places a step, then of eight, at equal tokens per step. It needs `order: shuffled`; empty: no curriculum."""
    mixed_samples: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each step's tokens that are single segments from many documents, beside samples of all segments. It
    needs `order: shuffled`; 0: none."""
    order: Literal["stream", "shuffled"] = "stream"
    """stream: each row reads consecutive samples of a document and carries its memory; shuffled: independent
    samples that start from empty memory."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the documents that is kept for validation."""
    max_documents: Annotated[int | None, Field(ge=2)] = None
    """Documents read from the source at most; None: as many as num_samples needs."""
    min_documents: Annotated[int, Field(ge=2)] = 10
    """A source with fewer documents has them cut at blank lines into contiguous parts, about twice as many as
    this in all; the parts are split as documents."""
    characters_per_token: Annotated[float, Field(gt=0)] = 6.0
    """Upper estimate of the characters in a token, by which to tell how much of a long source num_samples needs."""
    reversal_pairs: bool = True
    """Add the forward sentences of the reversal pairs to the training set."""
    reversal_repeats: Annotated[int, Field(gt=0)] = 1
    """How often an epoch holds each of these sentences, each time in another order. With more than one,
    max_reversal_share must usually be raised."""
    reversal_taught: Annotated[int, Field(ge=0)] = 0
    """Pairs of each relation, drawn by split_seed, whose backward sentences are trained on as well. They teach how the
    relation is told backward, and the curse is measured on the other pairs."""
    max_reversal_share: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Share of an epoch's training tokens that the reversal sentences may take. With a small text only some of the
    sentences join it, and none where fewer than a tenth of them would fit; 1: no limit."""
    planted_facts: Annotated[float, Field(ge=0, le=50)] = 0.0
    """Facts to recall in every 1,000 tokens of a training sample, each stated twice (changed ones three times), others
    in every epoch; 0: none.
    They need `order: shuffled`."""
    planted_distance: tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]] = (16, 1024)
    """Tokens from one statement of a planted fact to the next, at least and at most."""
    planted_made_up: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the names, and of the values in words, that are from no list, so that any word is learned to be
    recalled: made up of the tokenizer's pieces, or words of the sample's own text; the others are from the part
    "train" of the lists."""
    planted_tasks: Annotated[tuple[Literal["passkey", "facts", "changed"], ...], Field(min_length=1)] = ("facts",)
    """What is planted: passkey, a number of five digits; facts, one sentence about an invented person; changed, such a
    fact that is stated anew with another value before it is asked for."""
    planted_relations: Annotated[int, Field(ge=1, le=8)] = 8
    """Relations of a sample's facts, drawn for each sample. Of few, facts can be told apart by their names alone."""
    planted_backward: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the planted facts that are asked for backward: the value is given, and the name is the answer."""
    cache_dir: Path | None = None
    """Folder of the token caches; None: $NEW_LLM_CACHE, else ~/.cache/new-llm."""
    num_workers: Annotated[int, Field(gt=0)] = 1
    """Processes that tokenise; 1: this one, with the tokenizer's own threads."""
    shard_characters: Annotated[int, Field(gt=0)] = 1 << 25
    """Text that is tokenised at once: what is done again after a crash."""
    max_document_bytes: Annotated[int, Field(ge=1024)] = 1 << 27
    """A longer document is rejected: a .txt file, a WikiText article, a line of JSON, a Parquet row."""
    pile_name: str = "monology/pile-uncopyrighted"
    """Hub name of the Pile."""
    wikitext_name: str = "Salesforce/wikitext"
    """Hub name of WikiText; its configuration is wikitext-2-raw-v1."""
    hub_tokenizer: str = "EleutherAI/pythia-70m"
    """Hub name of the tokenizer that auto tries first for hub sources."""
    hub_timeout_seconds: Annotated[float, Field(gt=0)] = 5.0
    """How long to wait for the hub before it counts as out of reach."""

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
