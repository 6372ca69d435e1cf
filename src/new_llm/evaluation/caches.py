"""What untrained caches add to a model: the baseline that a trained memory has to beat.

Each document is read once. For each token the probabilities under the model, its last states and the text's n-grams are
stored, and all mixtures are computed from them afterwards. θ and the mixture weights are tuned on every other document
and applied to the rest, and vice versa, so that every document is measured with settings tuned on other documents.
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
from new_llm.data.tokenizer import loses_text
from new_llm.evaluation.measure import Column, Measure, ModelResult, Subject, Table, register_measure, to_plain
from new_llm.evaluation.scoring import Autocast, evaluation_mode, find_device, join_rows, plan_windows
from new_llm.evaluation.statistics import DocumentLosses, compare_models, estimate_perplexity
from new_llm.formats import format_bytes, format_percent, format_plural
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
"""Kinds of tokens, by the length of the longest n-gram that ends in the token and occurred earlier in the text."""
TEXT_CACHES = ("grams", "match")
"""Name endings of the caches that store nothing but the text. The last such cache covers the most exact repetition."""
TUNING_TOKENS = 50_000
"""The most tokens used to tune θ and the weights; for so few parameters, more make no difference."""


class Parts(NamedTuple):
    """The probabilities of a document's T tokens under each component; NaN where a component makes no prediction.

    Attributes:
        losses: the model's losses, [T].
        states: under the state cache, for each number of states and each θ, [T, N, Θ].
        ngrams: under the text's unigrams to n-grams, [T, n].
        matches: under the longest match, [T]; None if it is not enabled.
        contexts: `rank_context` for the longest match, [T].
    """

    losses: NDArray[np.float64]
    states: Probabilities
    ngrams: Probabilities
    matches: Probabilities | None
    contexts: NDArray[np.int64] | None

    def select(self, config: CacheConfig, sizes: Sequence[int], theta: int) -> Scored:
        """Select the components of one cache, with θ given by its index."""
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
    """The settings of a mixture, tuned on `num_tokens` tokens of other text."""

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
    """Read a document as a stream, from an empty memory, and return its tokens' probabilities.

    With `settings.reset_memory`, one segment is read per call and nothing is written.
    """
    carry = not settings.reset_memory
    num_segments = settings.segments_per_call if carry else 1
    ids = torch.from_numpy(tokens.astype(np.int64)).to(find_device(model))
    hidden: list[torch.Tensor] = []
    losses: list[torch.Tensor] = []
    with evaluation_mode(model, autocast), model.fresh_memory(batch_size=1):
        for window in plan_windows(len(tokens), num_segments * model.segment_length):
            piece = ids[None, window.begin : window.end]
            targets = model.find_targets(piece[:, :-1], piece)
            hidden.append(model.compute_hidden(piece[:, :-1], update_memory=carry))
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
    """Find the θ of the grid and the weights (by expectation maximization) under which documents are most probable.

    If there are more than TUNING_TOKENS tokens, a regular subsample is used.
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
    """Tune settings for each half of the documents on the other half; return them and each document's losses."""
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
    """Tune θ and the weights of a cache on some documents, which must not be those that it is measured on."""
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
    """Perplexity of long documents, by the model alone and with untrained caches."""

    name = "caches"
    title = "with caches"
    can_stop = True

    def run(self, subject: Subject) -> dict[str, Any] | None:
        """Measure the perplexity of long documents, read as streams, by the model alone and with each cache.

        The first long documents are scored, up to `subject.settings.max_tokens` tokens, but at least two documents.

        - `caches`, the bare model first: `name`, `num_states` N, `ngram_order`, `longest_match`, `perplexity`,
          `bits_per_byte` (None if a document was cut short), `relative` (perplexity / bare perplexity − 1, paired by
          document), `settings` (tuned for each half of the documents on the other half) and `size` (`describe_cache`).
        - `documents`: `index` in the split, `half`, and tokens and total loss by cache in each range of distance (the
          ranges begin at `range_starts`); `repetition` has the same by kind of token (see `REPETITION`).

        Returns None if the model does not expose its hidden states, or if fewer than two documents are long enough or
        were read, since tuning needs another document.
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
        num_bytes = split.count_raw(indices)[0] if is_whole and not loses_text(subject.tokenizer, split) else None
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
            "reset_memory": settings.reset_memory,
            "confidence": choice.confidence,
            "seconds": time.perf_counter() - began,
        }

    def columns(self, result: dict[str, Any]) -> list[Column]:
        """Return the perplexity with the last cache, the largest, and its relative difference from the bare model's."""
        last = result["caches"][-1]
        return [] if last["name"] == BARE else _describe_cache(last, "With caches")

    def losses(self, result: dict[str, Any]) -> dict[str, DocumentLosses]:
        """Return the losses of the bare model and with each cache.

        For the bare model and the last of the `TEXT_CACHES`, also return them for each kind of token in `REPETITION`.
        """
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
        """Return the perplexities with every cache."""
        rows = [(one["name"], _describe_cache(one, "")) for one in result["caches"]]
        emptied = " and an emptied memory" if result.get("reset_memory") else ""
        return [Table(f"With caches{emptied}, each", rows, is_for_studies=True)]

    def charts(self, results: Sequence[ModelResult]) -> list[Chart]:
        """Draw a dot for each model and cache."""
        rows = [
            {"model": one.name, "cache": found["name"], **found["perplexity"]}
            for one in results
            for found in one.result["caches"]
        ]
        caption = (
            "Perplexity of long documents by each model alone and with untrained caches of the same text. A memory "
            "that is still ahead when both have the same caches knows more than repetition."
        )
        columns: dict[str, Any] = {"x": "cache", "y": "value", "series": "model", "low": "low", "high": "high"}
        return [bar_chart("caches", "With caches", caption, rows, **columns, y_title="perplexity", is_dotted=True)]

    def describe(self, result: dict[str, Any]) -> str:
        """State the bare model's perplexity and the best cache's."""
        bare, best = result["caches"][0], min(result["caches"], key=lambda one: one["perplexity"]["value"])
        documents = format_plural(len(result["documents"]), "long document")
        reading = " read with an emptied memory" if result.get("reset_memory") else ""
        opening = f"perplexity of {documents}{reading} {bare['perplexity']['value']:,.2f}"
        if best is bare:
            return f"{opening}; no cache lowers it"
        change, low, high = best["relative"]["value"], best["relative"]["low"], best["relative"]["high"]
        interval = "" if low is None else f" [{100 * low:+.1f}, {100 * high:+.1f}]"
        cache = f"{best['name']} ({describe_size(best['size'])})"
        return f"{opening}; with {cache} {best['perplexity']['value']:,.2f}, {100 * change:+.1f} %{interval}"


def _describe_cache(found: dict[str, Any], group: str) -> list[Column]:
    """Make a cache's columns: in a group they bear its name; without one, the names shared by all rows of a table."""
    hint = describe_size(found["size"])
    shared: dict[str, Any] = {"better": "lower", "group": group}
    name = found["name"] if group else "perplexity"
    columns = [Column(name, name, **found["perplexity"], hint=hint, **shared)]
    if found["name"] != BARE:
        columns.append(Column("vs_bare", "vs. bare", **found["relative"], format=format_percent, **shared))
    return columns


def describe_size(size: dict[str, int]) -> str:
    """Describe how much a cache stores."""
    parts: list[str] = []
    if size["state_numbers"]:
        parts.append(f"{size['state_numbers']:,} numbers, {format_bytes(size['state_bytes'])}")
    if size["bytes_per_token"]:
        parts.append(f"{size['bytes_per_token']} bytes per token of the text")
    return " and ".join(parts)
