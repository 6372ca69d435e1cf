"""What caches that cost no training add to a model: the baseline that a trained memory has to beat.

Documents are read once. Of each token the probabilities by the model, by its last states and by the text's n-grams are
kept, and all mixtures are made of them afterwards. θ and the weights of a mixture are tuned on every other document and
applied to the rest, and the other way round: so every document is measured with settings that other documents gave.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray

from new_llm.charts import Chart, bar_chart
from new_llm.config.evaluation import CacheMeasureConfig
from new_llm.config.model import COMPONENTS, CacheConfig
from new_llm.evaluation.measure import Column, Measure, ModelResult, Subject, Table, register_measure, to_plain
from new_llm.evaluation.scoring import Autocast, evaluation_mode, find_device, join_rows, plan_windows
from new_llm.evaluation.statistics import DocumentLosses, compare_models, estimate_perplexity
from new_llm.formats import format_bytes, format_percent
from new_llm.models.cache import (
    MATCH,
    Probabilities,
    Scored,
    describe_cache,
    mix,
    prepare_states,
    score_match,
    score_ngrams,
    score_states,
    tune_weights,
)

BARE = "bare"
REPETITION = ("new tokens", "tokens seen before", "repeated bigrams", "repeated trigrams")
"""What a token of a text is, by the longest n-gram that ends in it and stands in the text before."""
TEXT_CACHES = ("grams", "match")
"""Ends of the names of caches that keep nothing but the text; the last of them knows all exact repetition."""
TUNING_TOKENS = 50_000
"""Tokens by which θ and weights are tuned at most: for so few numbers more make no difference."""


class Parts(NamedTuple):
    """What a document's tokens were expected to be; NaN where a component knows nothing.

    Attributes:
        losses: the model's own, [T].
        states: by the states, for each N and each θ, [T, N, Θ].
        ngrams: by unigrams and longer n-grams of the text, [T, n].
        matches: by the longest match, [T]; None: not asked for.
        contexts: of `rank_context` for the longest match, [T].
    """

    losses: NDArray[np.float64]
    states: Probabilities
    ngrams: Probabilities
    matches: Probabilities | None
    contexts: NDArray[np.int64] | None

    def select(self, config: CacheConfig, sizes: Sequence[int], theta: int) -> Scored:
        """What a cache knows, by the place of its θ."""
        found, contexts = np.full((len(self.losses), len(COMPONENTS)), np.nan), np.zeros(len(self.losses), np.int64)
        found[:, 0] = np.exp(-self.losses)
        if config.num_states:
            found[:, 1] = self.states[:, sizes.index(config.num_states), theta]
        if config.ngram_order:
            found[:, 2 : 2 + config.ngram_order] = self.ngrams[:, : config.ngram_order]
            contexts = (~np.isnan(found[:, 2:])).sum(1)
        if config.longest_match:
            assert self.matches is not None
            assert self.contexts is not None
            found[:, MATCH], contexts = self.matches, self.contexts
        return Scored(found, contexts)


class Tuned(NamedTuple):
    """Settings of a mixture, tuned on this many tokens of other text."""

    theta: float
    weights: list[list[float]]
    num_tokens: int


def read_parts(
    model: Any,
    tokens: NDArray[Any],
    settings: CacheMeasureConfig,
    *,
    autocast: Autocast = contextlib.nullcontext,
) -> Parts:
    """Read a document as a stream, from an empty memory; what its tokens were expected to be."""
    ids = torch.from_numpy(tokens.astype(np.int64)).to(find_device(model))
    hidden: list[torch.Tensor] = []
    losses: list[torch.Tensor] = []
    with evaluation_mode(model, autocast), model.fresh_memory(batch_size=1):
        for window in plan_windows(len(tokens), settings.segments_per_call * model.segment_length):
            piece = ids[None, window.begin : window.end]
            targets = model.find_targets(piece[:, :-1], piece)
            hidden.append(model.compute_hidden(piece[:, :-1], update_memory=True))
            losses.append(model.score_passes([hidden[-1]], targets)[0].double().cpu())
        states = prepare_states(torch.cat(hidden, dim=1)[0], settings.similarity)
        by_states = [score_states(states, ids[:-1], ids[1:], size, settings.thetas) for size in settings.sizes]
    read = tokens.astype(np.int64)
    matches = score_match(read) if settings.longest_match else (None, None)
    shape = (len(tokens) - 1, len(by_states), len(settings.thetas))
    stacked = np.stack(by_states, axis=1) if by_states else np.empty(shape)
    by_ngrams = score_ngrams(read, max(settings.ngram_orders, default=0))
    return Parts(torch.cat(losses).numpy(), stacked, by_ngrams, *matches)


def tune(parts: Sequence[Parts], settings: CacheMeasureConfig, config: CacheConfig) -> Tuned:
    """The θ among those given, and its weights by EM, that make some documents most probable.

    Of more than TUNING_TOKENS tokens, evenly spread ones are used.
    """
    stride = -(-sum(len(one.losses) for one in parts) // TUNING_TOKENS)
    found: list[tuple[float, Tuned]] = []
    for place, theta in enumerate(settings.thetas[: None if config.num_states else 1]):
        selected = [one.select(config, settings.sizes, place) for one in parts]
        scored = Scored(*(np.concatenate(rows)[::stride] for rows in zip(*selected, strict=True)))
        weights = tune_weights(scored, config.weights)
        likelihood = float(np.log(mix(scored, weights)).sum())
        found.append((likelihood, Tuned(theta, weights.tolist(), len(scored.contexts))))
    return max(found)[1]


def cross_tune(
    parts: Sequence[Parts], settings: CacheMeasureConfig, config: CacheConfig
) -> tuple[list[Tuned], list[NDArray[np.float64]]]:
    """Settings for either half of the documents from the other one, and each document's losses with them."""
    tuned = [tune(parts[1 - half :: 2], settings, config) for half in range(2)]
    losses: list[NDArray[np.float64]] = []
    for place, found in enumerate(parts):
        chosen = tuned[place % 2]
        scored = found.select(config, settings.sizes, settings.thetas.index(chosen.theta))
        losses.append(-np.log(mix(scored, chosen.weights)))
    return tuned, losses


def tune_cache(
    model: Any,
    documents: Sequence[NDArray[Any]],
    config: CacheConfig,
    settings: CacheMeasureConfig | None = None,
    *,
    autocast: Autocast = contextlib.nullcontext,
) -> CacheConfig:
    """A cache with θ and weights that make some documents most probable; they must not be the ones to be measured."""
    chosen = dataclasses.replace(
        settings or CacheMeasureConfig(),
        similarity=config.similarity,
        sizes=(config.num_states,) if config.num_states else (),
        ngram_orders=(config.ngram_order,) if config.ngram_order else (),
        longest_match=config.longest_match,
    )
    parts = [read_parts(model, tokens, chosen, autocast=autocast) for tokens in documents]
    tuned = tune(parts, chosen, config)
    weights: Any = tuple(map(tuple, tuned.weights))
    return dataclasses.replace(config, theta=tuned.theta, weights=weights)


@register_measure
class Caches(Measure):
    """Long documents by the model alone and with caches that cost no training."""

    name = "caches"
    title = "with caches"
    can_stop = True

    def run(self, subject: Subject) -> dict[str, Any] | None:
        """Perplexity of long documents by the model alone and with each cache; documents are read as streams.

        Of `subject.settings.max_tokens` the first long documents are scored, but two at least.

        `caches`, the bare model first, have their `name`, `num_states` N, `ngram_order` (of the longest n-grams),
        `longest_match`, `perplexity`, `bits_per_byte` (None where documents were cut short), the perplexity `relative`
        to the bare model's − 1, paired by document, the `settings` that were tuned for each half of the documents on
        the other half, and `size`, of `describe_cache`. `documents` have their index in the split, half, and by range
        of distance, the ranges beginning at `range_starts`, tokens and total loss by cache; `repetition` has the same
        by what a token repeats (`REPETITION`).

        Returns:
            None for a model whose hidden states can't be had, and where fewer than two documents are long enough (or
            were read): none could be tuned on another.
        """
        model, split, settings = subject.model, subject.split, subject.settings.caches
        choice, max_tokens = subject.settings.long_documents, subject.settings.max_tokens
        if not hasattr(model, "compute_hidden"):
            return None
        began = time.perf_counter()
        indices = split.find_long(choice.min_tokens)[: choice.max_documents]
        lengths = np.minimum(split.lengths[indices], choice.max_tokens_per_document or np.inf).astype(np.int64) - 1
        if max_tokens is not None:
            num_kept = max(2, int(np.searchsorted(lengths.cumsum(), max_tokens, side="right")))
            indices, lengths = indices[:num_kept], lengths[:num_kept]
        parts: list[Parts] = []
        for index, length in zip(indices, lengths, strict=True) if len(indices) > 1 else ():
            document = split.document(int(index))[: length + 1]
            parts.append(read_parts(model, document, settings, autocast=subject.autocast))
            if subject.on_progress:
                subject.on_progress(int(lengths[: len(parts)].sum()), int(lengths.sum()))
            if subject.should_stop():
                break
        if len(parts) < 2:
            return None
        indices, num_planned, lengths = indices[: len(parts)], int(lengths.sum()), lengths[: len(parts)]
        is_whole = choice.max_tokens_per_document is None or bool((split.lengths[indices] == lengths + 1).all())
        num_bytes = int(split.num_bytes[indices].sum()) if is_whole else None
        vocab_size, hidden_size = cast(Any, model).embed_out.weight.shape
        caches: list[dict[str, Any]] = []
        losses: dict[str, DocumentLosses] = {}
        by_repetition: dict[str, DocumentLosses] = {}
        orders = range(1 + max(settings.ngram_orders, default=0))
        repeated = np.concatenate([(found.ngrams > 0).sum(1) for found in parts])
        for name, config in settings.list_caches().items():
            tuned, rows = [], [found.losses for found in parts]
            if name != BARE:
                tuned, rows = cross_tune(parts, settings, config)
            scores = join_rows((place, 1, row) for place, row in enumerate(rows))
            losses[name] = DocumentLosses.sum([scores], len(parts), choice.edges)
            by_repetition[name] = DocumentLosses.sum([scores._replace(positions=repeated)], len(parts), orders)
            compared = compare_models({0: losses[name]}, {0: losses[BARE]}, choice.confidence)
            assert compared is not None  # the documents are the same
            total_nll = float(losses[name].total_nll.sum())
            caches.append(
                {
                    "name": name,
                    "num_states": config.num_states,
                    "ngram_order": config.ngram_order,
                    "longest_match": config.longest_match,
                    "perplexity": estimate_perplexity(losses[name], choice.confidence),
                    "bits_per_byte": total_nll / math.log(2) / num_bytes if num_bytes else None,
                    "relative": compared.relative,
                    "settings": tuned,
                    "size": describe_cache(config, hidden_size, vocab_size),
                }
            )
        return {
            "caches": to_plain(caches),
            "documents": [
                {
                    "index": int(index),
                    "half": place % 2,
                    "num_tokens": losses[BARE].num_tokens[place].tolist(),
                    "total_nll": {name: one.total_nll[place].tolist() for name, one in losses.items()},
                    "repetition": {
                        "num_tokens": by_repetition[BARE].num_tokens[place].tolist(),
                        "total_nll": {name: one.total_nll[place].tolist() for name, one in by_repetition.items()},
                    },
                }
                for place, index in enumerate(indices)
            ],
            "range_starts": list(choice.edges),
            "num_tokens": int(lengths.sum()),
            "num_planned": num_planned,
            "is_complete": int(lengths.sum()) == num_planned,
            "similarity": settings.similarity,
            "confidence": choice.confidence,
            "seconds": time.perf_counter() - began,
        }

    def columns(self, result: dict[str, Any]) -> list[Column]:
        """The perplexity with the last cache, which holds all, and what it is worth against the bare model."""
        last = result["caches"][-1]
        return [] if last["name"] == BARE else _describe_cache(last, "With caches")

    def losses(self, result: dict[str, Any]) -> dict[str, DocumentLosses]:
        """The bare model's and those with each cache; of the bare model and the last `TEXT_CACHES` also on each kind
        of tokens of `REPETITION`."""
        documents = result["documents"]
        counts = [document["num_tokens"] for document in documents]
        found = {
            name: DocumentLosses.read(counts, [one["total_nll"][name] for one in documents], result["range_starts"])
            for name in documents[0]["total_nll"]
        }
        for name in [BARE, *[name for name in found if name.endswith(TEXT_CACHES)][-1:]]:
            for place in range(len(documents[0].get("repetition", {}).get("num_tokens", ()))):
                parts = [one["repetition"] for one in documents]
                key = REPETITION[place] if name == BARE else f"{REPETITION[place]}, {name}"
                found[key] = DocumentLosses.read(
                    [part["num_tokens"][place] for part in parts], [part["total_nll"][name][place] for part in parts]
                )
        return found

    def tables(self, result: dict[str, Any]) -> list[Table]:
        """The same of every cache."""
        rows = [(one["name"], _describe_cache(one, "")) for one in result["caches"]]
        return [Table("With caches, each", rows, is_for_studies=True)]

    def charts(self, results: Sequence[ModelResult]) -> list[Chart]:
        """A dot for each model and cache."""
        rows = [
            {"model": one.name, "cache": found["name"], **found["perplexity"]}
            for one in results
            for found in one.result["caches"]
        ]
        caption = (
            "Perplexity of long documents by each model alone and with caches of the same text, which cost no "
            "training. A memory knows more than repetition where it is ahead with the same caches."
        )
        columns: dict[str, Any] = {"x": "cache", "y": "value", "series": "model", "low": "low", "high": "high"}
        return [bar_chart("caches", "With caches", caption, rows, **columns, y_title="perplexity", is_dotted=True)]

    def describe(self, result: dict[str, Any]) -> str:
        """The bare model, and the cache that brings most."""
        bare, best = result["caches"][0], min(result["caches"], key=lambda one: one["perplexity"]["value"])
        opening = f"perplexity of {len(result['documents'])} long documents {bare['perplexity']['value']:,.2f}"
        if best is bare:
            return f"{opening}; no cache lowers it"
        change, low, high = best["relative"]["value"], best["relative"]["low"], best["relative"]["high"]
        interval = "" if low is None else f" [{100 * low:+.1f}, {100 * high:+.1f}]"
        cache = f"{best['name']} ({describe_size(best['size'])})"
        return f"{opening}; with {cache} {best['perplexity']['value']:,.2f}, {100 * change:+.1f} %{interval}"


def _describe_cache(found: dict[str, Any], group: str) -> list[Column]:
    """A cache's columns: its own ones in a group, or those that all rows of a table share."""
    hint = describe_size(found["size"])
    shared: dict[str, Any] = {"better": "lower", "group": group}
    name = found["name"] if group else "perplexity"
    columns = [Column(name, name, **found["perplexity"], hint=hint, **shared)]
    if found["name"] != BARE:
        columns.append(Column("vs_bare", "vs. bare", **found["relative"], format=format_percent, **shared))
    return columns


def describe_size(size: dict[str, int]) -> str:
    """What a cache stores, in words."""
    parts: list[str] = []
    if size["state_numbers"]:
        parts.append(f"{size['state_numbers']:,} numbers, {format_bytes(size['state_bytes'])}")
    if size["bytes_per_token"]:
        parts.append(f"{size['bytes_per_token']} bytes per token of the text")
    return " and ".join(parts)
