"""Train a parallel memory adapter on long documents and compare it with its base; otherwise a run like any other.

The run's models are `base`, which is only measured, and `parallel_infini`, the base with the adapter. In addition to
the usual measures, both read long held-out documents. This shows whether the carried memory helps, or only what the
adapter adds inside a segment.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from new_llm.config import UserError
from new_llm.config.evaluation import TextConfig
from new_llm.data.dataset import PreparedData, count_text, prepare_data, read_evaluation_text
from new_llm.data.hub import hub_answers
from new_llm.data.tokenizer import TokenSplit, check_vocabulary
from new_llm.evaluation import Baseline, Subject, find_measures, measure
from new_llm.experiments.config import ADAPTER_MODELS, AdapterTrainingConfig
from new_llm.experiments.run_folder import find_model_folder, find_tokenizer_file
from new_llm.experiments.runner import Run
from new_llm.models import TransformerLM
from new_llm.models.hf.infini_adapter import add_parallel_infini, load_base, save_adapter, split_weights
from new_llm.models.model_file import load_model
from new_llm.training.checkpoint import BEST_FOLDER
from new_llm.training.devices import seed_generators

BASE, ADAPTED = ADAPTER_MODELS
WIKITEXT_ON_HUB = "wikitext-2"
CHOICE_STREAM = 3
"""Keeps the choice of documents independent of other random numbers of the same seed."""
BASE_HERE = (
    "or train a base with `new-llm experiment --models pythia --data.source sotu --name base` and pass "
    "`--base runs/base`"
)


def train_adapter(config: AdapterTrainingConfig, **options: Any) -> dict[str, Any]:
    """Train and measure an adapter, and write its file; options, results and errors as in `run_experiment`."""
    return AdapterRun(config, **options).execute()


class AdapterRun(Run[AdapterTrainingConfig]):
    """A run of a base, and of the base with an adapter that is trained on streams of whole documents."""

    untrained = (BASE,)

    def check(self) -> None:
        """Reject unknown measures, and a path where the adapter's file can't be written."""
        find_measures([*self.config.eval.measures, *self.config.eval.checkpoint_measures])
        out = self.config.out
        if out.is_dir():
            raise UserError(f"--out: {out} is a folder")
        out.parent.mkdir(parents=True, exist_ok=True)
        # All samples of the chosen documents; data.num_samples only limits how much of the source is read.
        self.training_data = dataclasses.replace(self.config.data, num_samples=None)

    def prepare(self) -> PreparedData:
        """The source's long documents, tokenised for the base, and the further text to measure on."""
        self.source, tokenizer_name = find_base(self.config)
        base = load_configured_base(self.config, self.source)
        data = prepare_documents(self.config, tokenizer_name)
        fault = f"--base {self.config.base}: the tokenizer has ids up to {{}}; the base"
        check_vocabulary(data.tokenizer, base.vocab_size, fault)
        add_parallel_infini(base, self.config.adapter, base_name=str(self.source))  # rejects layers that the base lacks
        self.texts = {"held_out": data.validation}
        if self.config.wikitext is not None:
            try:
                text = read_evaluation_text(TextConfig(source=self.config.wikitext), data.tokenizer)
                self.texts["wikitext"] = text.split
            except UserError as error:
                if self.config.wikitext != WIKITEXT_ON_HUB:
                    raise
                note = f"WikiText-2 is not measured: {error} (use a local file: --wikitext FILE)"
                data.info["notes"].append(note)
        return data

    def build(self, name: str) -> TransformerLM:
        """The base, with or without the adapter."""
        base = load_configured_base(self.config, self.source)
        if name == BASE:
            return base
        seed_generators(self.config.seed)  # again, because loading the base may have drawn random numbers
        return add_parallel_infini(base, self.config.adapter, base_name=str(self.source))

    def finish(self, results: dict[str, Any]) -> dict[str, Any]:
        """Write the adapter's file, and measure base and adapter on the long texts."""
        best = load_model(self.model_folder(ADAPTED) / BEST_FOLDER)
        save_adapter(best, self.config.out, with_base=not self.config.adapter.freeze_base_model)
        num_base, num_adapter = (sum(tensor.numel() for tensor in part.values()) for part in split_weights(best))
        return results | {
            "kind": "parallel_adapter",
            "num_parameters": {
                "base": num_base,
                "adapter": num_adapter,
                "trained": num_adapter + (0 if self.config.adapter.freeze_base_model else num_base),
            },
            "alpha": best.get_alpha(),
            "evaluation": self._measure_texts(best),
        }

    def _measure_texts(self, adapted: TransformerLM) -> dict[str, Any]:
        """By text: the adapted model with memory carried, reset and foreign, and the base, on the same tokens."""
        settings = self.config.eval
        long = dataclasses.replace(settings.long_documents, min_tokens=2, batch_size=settings.batch_size)
        base = load_configured_base(self.config, self.source).to(self.device).eval()
        adapted = adapted.to(self.device).eval()
        measured: dict[str, Any] = {}
        with self.console.status("") as status:
            for name, split in self.texts.items():
                status.update(f"measuring {name}")
                if settings.max_tokens is not None:  # the first documents within this limit, but at least two
                    number = int((split.offsets[1:] <= settings.max_tokens).sum())
                    long = dataclasses.replace(long, max_documents=max(number, 2))
                subject = Subject(
                    adapted,
                    self.data.tokenizer,
                    split,
                    dataclasses.replace(settings, long_documents=long),
                    autocast=self.autocast,
                    baselines=[Baseline(BASE, base, autocast=self.autocast)],
                )
                measured[name] = measure(subject, ["long"])["long"]
        return measured


# The base


def find_base(config: AdapterTrainingConfig) -> tuple[str | Path, str]:
    """The base (a hub name or a folder) and its tokenizer (a hub name or a file)."""
    folder, given = Path(config.base).expanduser(), config.data.tokenizer
    if not folder.is_dir():
        return config.base, config.base if given == "auto" else given
    if not (folder / "config.json").is_file():
        own = folder / "pythia" / BEST_FOLDER
        folder = own if own.is_dir() else find_model_folder(folder)
    return folder, str(find_tokenizer_file(folder)) if given == "auto" else given


def load_configured_base(config: AdapterTrainingConfig, source: str | Path) -> TransformerLM:
    """Load the base with the segment length of the training; if the hub is out of reach, say how to train one."""
    try:
        return load_base(source, revision=config.revision, segment_length=config.segment_length)
    except UserError as error:
        timeout = config.data.hub_timeout_seconds
        if isinstance(source, Path) or hub_answers(f"{source}/resolve/main/config.json", timeout):
            raise
        raise UserError(f"--base {error}; {BASE_HERE}") from None
    except ValueError as error:
        raise UserError(
            f"--base {source}: {error}; a segment is data.seq_length ({config.data.seq_length}) / "
            f"data.segments_per_sample ({config.data.segments_per_sample})"
        ) from None


# The documents


def prepare_documents(config: AdapterTrainingConfig, tokenizer_name: str) -> PreparedData:
    """The source's long documents, split, and tokenised with the base's tokenizer; errors as in `prepare_data`."""
    return choose_long_documents(prepare_data(dataclasses.replace(config.data, tokenizer=tokenizer_name)), config)


def choose_long_documents(data: PreparedData, config: AdapterTrainingConfig) -> PreparedData:
    """Draw long training documents, and keep all long validation documents; each is cut to `max_doc_tokens`.

    If no validation document is long, all are kept, with a note.
    """
    min_tokens = config.min_doc_tokens or config.data.seq_length
    notes = list(data.info.get("notes", []))
    long, longest = data.train.find_long(min_tokens), int(data.train.lengths.max(initial=0))
    if not len(long):
        raise UserError(
            f"{data.info['source']}: no training document has {min_tokens:,} tokens (the longest has "
            f"{longest:,}); use longer documents, a smaller --min-doc-tokens or a smaller --seq-length"
        )
    if len(long) < config.num_docs:
        notes.append(f"long documents asked for: {config.num_docs:,}; of {min_tokens:,} tokens or more: {len(long):,}")
    order = np.random.default_rng([config.data.split_seed, CHOICE_STREAM]).permutation(long)
    chosen = np.sort(order[: config.num_docs])
    held_out = data.validation.find_long(min_tokens)
    if not len(held_out):
        notes.append(f"no held-out document has {min_tokens:,} tokens, so all are measured")
        held_out = np.arange(data.validation.num_documents)
    train = cut_documents(data.train, chosen, config.max_doc_tokens)
    validation = cut_documents(data.validation, held_out, config.max_doc_tokens)
    info = data.info | {
        "notes": notes,
        "min_doc_tokens": min_tokens,
        "train": count_text(train),
        "validation": count_text(validation),
    }
    return dataclasses.replace(data, train=train, validation=validation, info=info)


def cut_documents(split: TokenSplit, chosen: NDArray[np.int64], max_tokens: int | None) -> TokenSplit:
    """The chosen documents of a split, in this order, cut to `max_tokens`; byte and word counts of cut documents are
    unknown."""
    is_whole = split.lengths[chosen] <= (max_tokens or np.inf)
    documents = [split.document(int(index))[:max_tokens] for index in chosen]
    return TokenSplit(
        tokens=np.concatenate(documents),
        offsets=np.cumsum([0, *map(len, documents)], dtype=np.int64),
        num_bytes=split.num_bytes[chosen] * is_whole,
        num_words=split.num_words[chosen] * is_whole,
    )
