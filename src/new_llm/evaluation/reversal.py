"""The reversal curse: a model that learned "A is B" need not know "B is A" (arXiv:2309.12288).

Knowledge can be in three places. The weights may know the pairs that training stated forward, many times. The memory
and the context may know fresh facts of a text just read, each stated once, forward (`_ask_fresh_texts`).
"""

import contextlib
import dataclasses
import functools
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray

from new_llm.charts import Chart, bar_chart
from new_llm.config import UserError
from new_llm.config.evaluation import ReversalConfig
from new_llm.data.recall_facts import SentenceBorders, draw_pairs_of_facts
from new_llm.data.reversal_pairs import ReversalPair, draw_pairs, get_reversal_pairs, read_reversal_pairs
from new_llm.data.tokenizer import encode_text
from new_llm.evaluation.language_models import has_memory
from new_llm.evaluation.measure import Column, Measure, ModelResult, Subject, Table, register_measure, to_plain
from new_llm.evaluation.recall import (
    NOTHING,
    Answer,
    Question,
    find_exact,
    pose_question,
    rank_first,
    read_context,
    score_answers,
)
from new_llm.evaluation.scoring import (
    Autocast,
    LanguageModel,
    Progress,
    Reading,
    Scorer,
    Window,
    count_shared,
    evaluation_mode,
    join_scores,
)
from new_llm.evaluation.statistics import DocumentLosses, draw_resamples, find_interval
from new_llm.formats import format_count, format_number, format_percent, format_plural
from new_llm.processes import ALONE, Processes

Direction = Literal["forward", "backward"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")


class PairLosses(NamedTuple):
    """The losses of one pair in one direction.

    Attributes:
        total_nll: of the sentence's `num_tokens` tokens except the first, in nats.
        answer_nll: of the answer's `num_answer_tokens` tokens, in nats.
        rank: of the right answer among the answers of its relation: 1 + the number of more likely ones + half the
            number of equally likely ones.
        num_candidates: the number of ranked answers, including the right one.
    """

    total_nll: float
    num_tokens: int
    answer_nll: float
    num_answer_tokens: int
    rank: float
    num_candidates: int


@dataclass(frozen=True)
class ReversalScores:
    """The figures of one group of pairs.

    Perplexities are over a sentence's tokens except the first, or (`answer`) over the answer's tokens given the prompt.
    Even a sentence known by heart does not reach a sentence perplexity of 1, because its subject can't be predicted.
    Ranks are among the answers of the relation; 1 is best and a tie counts half. Accuracy is the share of pairs whose
    right answer ranks first. Chance is the expectation of a random guess, averaged over pairs and both directions.
    `intervals` has the confidence interval of every figure except counts and chance.
    """

    num_pairs: int
    forward_perplexity: float
    backward_perplexity: float
    ratio: float
    """Forward / backward perplexity: 1 if both directions are known equally well, near 0 under the curse."""
    gap: float
    """Backward − forward perplexity; 0 is best."""
    forward_answer_perplexity: float
    backward_answer_perplexity: float
    answer_ratio: float
    forward_accuracy: float
    backward_accuracy: float
    chance_accuracy: float
    forward_mean_rank: float
    backward_mean_rank: float
    chance_mean_rank: float
    intervals: dict[str, list[float]]


@dataclass(frozen=True)
class ReversalResult(ReversalScores):
    """The figures of all pairs, of each relation, and of each `ReversalPair.kind`."""

    per_relation: dict[str, ReversalScores]
    by_kind: dict[str, ReversalScores]
    ranks: dict[str, list[float]]
    """The rank of each pair's right answer, by direction."""
    bootstrap: dict[str, Any]
    """The settings of the intervals."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        plain = to_plain(self)
        return plain | {"per_relation": [{"relation": name} | one for name, one in plain["per_relation"].items()]}


class ReversalTable:
    """The losses of all pairs, with one table of bootstrap resamples for all figures.

    The relations are fixed, and the pairs of each are a sample: a resample draws from each relation as many pairs as it
    has, with replacement. All figures use the same resamples, so that ratio and gap are paired.
    """

    def __init__(
        self, readings: Mapping[str, list[PairLosses]], relations: Sequence[str], settings: ReversalConfig
    ) -> None:
        self.columns = {
            direction: {name: np.array([getattr(r, name) for r in found], np.float64) for name in PairLosses._fields}
            for direction, found in readings.items()
        }
        self.confidence = settings.confidence
        self.resamples = np.zeros((settings.num_resamples, len(relations)))
        names = np.array(relations)
        groups = list(dict.fromkeys(relations))
        seeds = np.random.SeedSequence(settings.seed).generate_state(len(groups))
        for group, group_seed in zip(groups, seeds, strict=True):
            members = np.flatnonzero(names == group)
            self.resamples[:, members] = draw_resamples(len(members), settings.num_resamples, int(group_seed))

    def summarize(self, chosen: NDArray[np.bool_]) -> ReversalScores:
        """Compute the figures of the pairs where `chosen`, [num_pairs], is True."""
        figures = self._compute(chosen[None].astype(np.float64))
        resampled = self._compute(self.resamples * chosen)
        candidates = np.concatenate([table["num_candidates"][chosen] for table in self.columns.values()])
        return ReversalScores(
            num_pairs=int(chosen.sum()),
            **{name: float(value[0]) for name, value in figures.items()},
            chance_accuracy=float(np.mean(1 / candidates)),
            chance_mean_rank=float(np.mean((candidates + 1) / 2)),
            intervals={name: list(find_interval(values, self.confidence)) for name, values in resampled.items()},
        )

    def _compute(self, weights: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        """Compute all figures, [R] each, for weights [R, num_pairs]: how often each pair counts. NaN if none does."""
        figures: dict[str, NDArray[np.float64]] = {}
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            for way, table in self.columns.items():
                total = {name: weights @ values for name, values in table.items()}
                count = weights.sum(1)
                figures[f"{way}_perplexity"] = np.exp(total["total_nll"] / total["num_tokens"])
                figures[f"{way}_answer_perplexity"] = np.exp(total["answer_nll"] / total["num_answer_tokens"])
                figures[f"{way}_accuracy"] = weights @ (table["rank"] == 1) / count
                figures[f"{way}_mean_rank"] = total["rank"] / count
            figures["ratio"] = figures["forward_perplexity"] / figures["backward_perplexity"]
            figures["answer_ratio"] = figures["forward_answer_perplexity"] / figures["backward_answer_perplexity"]
            figures["gap"] = figures["backward_perplexity"] - figures["forward_perplexity"]
        return figures


def evaluate_reversal_curse(
    model: LanguageModel,
    tokenizer: Any,
    pairs: Iterable[ReversalPair],
    device: torch.device | str | None = None,
    *,
    autocast: Autocast = contextlib.nullcontext,
    on_progress: Progress | None = None,
    processes: Processes = ALONE,
    **options: Any,
) -> ReversalResult:
    """Compare how well a model knows facts forward, as trained, and backward.

    Perplexity is exp(total negative log-likelihood / tokens) over all tokens of all sentences, except each sentence's
    first. Answer perplexity covers only the answers' tokens given the prompt, from the first token in which the
    sentence differs from the prompt alone.

    Ranks compare the right answer after each prompt with the answers of the other pairs of the relation, by total
    negative log-likelihood −ln p(answer | prompt). The mean per token would favour long names, whose later pieces are
    certain given the first ones. The total favours short answers, but a preference that is the same after every prompt
    can't lift accuracy above chance. Duplicate answers count once, and other right answers to the same prompt don't
    compete. A tie counts half in the rank, so that a model without preferences has the mean rank of a guess, and does
    not count as first in the accuracy.

    Prompt and answer are tokenized as one text, as in training. A token may straddle their border, differently for each
    answer, so the totals begin at the first token in which the candidates' texts differ; the tokens before it are
    equally probable for all candidates and change no rank.

    Intervals are percentile bootstrap intervals over pairs, drawn within each relation (see `ReversalTable`). The
    competing answers are those of all pairs in every resample.

    Args:
        model: run in evaluation mode with an empty memory; its held memory is neither read nor changed.
        tokenizer: of `tokenizers` or `transformers`.
        pairs: the facts.
        device: the device to move the model to; None: leave it where it is.
        autocast: makes the context in which the model computes.
        on_progress: called with the tokens scored so far and in all.
        processes: the processes that share the work; each gets the whole result.
        options: fields of `ReversalConfig`: batch_size, max_sentences, num_resamples, confidence, seed.

    Raises:
        UserError: no pairs, more sentences than allowed, no sentence of two tokens, or an option out of range.
    """
    settings, pairs = ReversalConfig(**options), list(pairs)
    if device is not None:
        cast(Any, model).to(device)
    if not pairs:
        raise UserError("reversal: there are no pairs")
    relations, kinds = [pair.relation for pair in pairs], [str(pair.kind) for pair in pairs]
    needed = {relation: 2 * count**2 for relation, count in Counter(relations).items()}
    if (total := sum(needed.values())) > settings.max_sentences:
        largest = max(needed, key=lambda name: needed[name])
        raise UserError(
            f"reversal: {total:,} sentences to score exceed the limit of {settings.max_sentences:,}; "
            f"{needed[largest]:,} of them are of the relation {largest[:40]!r}: draw fewer with --pairs-per-relation, "
            "or raise --max-sentences"
        )
    tasks = {direction: _list_candidates(pairs, direction) for direction in DIRECTIONS}
    texts = {text: None for found in tasks.values() for _, candidates in found for text in candidates}
    encoded = {text: encode_text(tokenizer, text) for text in texts}
    how = Reading(batch_size=settings.batch_size, autocast=autocast, on_progress=on_progress, processes=processes)
    scorer = Scorer(model, list(encoded.values()), how)
    own = scorer.score_windows(lambda length: [Window(0, length, 1)] if length > 1 else [])
    scores = join_scores(batch for found in processes.gather(own) for batch in found)
    counts = np.bincount(scores.documents, minlength=len(encoded))
    in_order = scores.losses[np.argsort(scores.documents, kind="stable")]
    losses = dict(zip(encoded, np.split(in_order, np.cumsum(counts)[:-1]), strict=True))
    readings = {
        direction: [_read(encoded, losses, encode_text(tokenizer, prompt), texts) for prompt, texts in found]
        for direction, found in tasks.items()
    }
    if any(not sum(reading.num_tokens for reading in found) for found in readings.values()):
        raise UserError("reversal: no sentence has two tokens or more, so there is nothing to score")

    table = ReversalTable(readings, relations, settings)

    per_relation, by_kind = (
        {name: table.summarize(np.array(names) == name) for name in dict.fromkeys(names)}
        for names in (relations, kinds)
    )
    return ReversalResult(
        **vars(table.summarize(np.ones(len(pairs), bool))),
        per_relation=per_relation,
        by_kind=by_kind,
        ranks={direction: [reading.rank for reading in found] for direction, found in readings.items()},
        bootstrap={
            "method": "percentile; pairs drawn within each relation",
            "num_resamples": settings.num_resamples,
            "confidence": settings.confidence,
            "seed": settings.seed,
        },
    )


# Knowledge in three places

PLACES = {"weights": "weights", "memory": "memory", "context": "context", "nothing": "nothing read"}
"""Readers' names for the places; "nothing read" is the control for memory and context."""
SENTENCE_REACH = 1024  # how many tokens to search for the end of a sentence


def count_hits(groups: Sequence[str], first: Sequence[bool], exact: Sequence[bool]) -> dict[str, list[float]]:
    """Count the results of one direction's questions for each group (text or relation), whose answers compete.

    Returns lists with an entry per group: `num_questions`; how many right answers ranked `first`; how many greedy
    decoding gave (`exact`); and how many a random guess would rank first on average (`chance`), which is 1.
    """
    names = list(dict.fromkeys(groups))

    def add(hits: Sequence[float]) -> list[float]:
        return [sum(hit for group, hit in zip(groups, hits, strict=True) if group == name) for name in names]

    counted = {"num_questions": add([1] * len(groups)), "first": add(first), "exact": add(exact)}
    return counted | {"chance": [1.0] * len(names)}


def ask_places(subject: Subject, pairs: Sequence[ReversalPair], result: ReversalResult) -> dict[str, Any]:
    """Return the hits (`count_hits`) by place and direction: of pairs, for the weights, and of fresh facts, for others.

    A model without memory has no entry "memory".

    Raises:
        UserError: there is no text, or a segment is too short for the facts and a question.
    """
    model, settings = subject.model, subject.settings.reversal
    relations, size = [pair.relation for pair in pairs], settings.batch_size
    found: dict[str, dict[str, Any]] = {}
    with evaluation_mode(model, subject.autocast):
        for direction in DIRECTIONS if "weights" in settings.places else ():
            asked = [_pose(subject.tokenizer, [pair], 0, direction) for pair in pairs]
            with model.fresh_memory():
                exact = [one for i in range(0, len(asked), size) for one in find_exact(model, asked[i : i + size])]
            first = [rank == 1 for rank in result.ranks[direction]]
            found.setdefault("weights", {})[direction] = count_hits(relations, first, exact)
        if {"memory", "context"} & set(settings.places):
            found |= _ask_fresh_texts(subject)
        return found


def _pose(tokenizer: Any, group: Sequence[ReversalPair], number: int, direction: Direction) -> Question:
    """Make the question for one fact of a group; all facts' answers are candidates."""
    answers = [getattr(pair, f"{direction}_answer") for pair in (group[number], *group[:number], *group[number + 1 :])]
    return pose_question(
        functools.partial(encode_text, tokenizer), getattr(group[number], f"{direction}_prompt"), answers
    )


def _ask_fresh_texts(subject: Subject) -> dict[str, dict[str, Any]]:
    """Ask for all facts, in both directions, of texts just read, which alone state them.

    The facts follow text of the subject's documents that ends at a sentence border. For "memory" they end the text's
    only segment, and the question begins the next one; for "context" the question follows in the same segment.
    """
    model, settings, tokenizer = subject.model, subject.settings.reversal, subject.tokenizer
    num_facts, size = settings.facts_per_text, model.segment_length
    pairs = draw_pairs_of_facts(
        settings.part, settings.fresh_texts, num_facts, settings.seed, one_relation=settings.one_relation
    )
    groups = [pairs[begin : begin + num_facts] for begin in range(0, len(pairs), num_facts)]
    told = [np.concatenate([encode_text(tokenizer, pair.forward) for pair in group]) for group in groups]
    questions = {way: [[_pose(tokenizer, g, i, way) for g in groups] for i in range(num_facts)] for way in DIRECTIONS}
    asks_here = "context" in settings.places  # whether to ask in the facts' own segment
    longest = max(one.num_tokens + 1 for asked in questions.values() for some in asked for one in some)
    room = size - asks_here * longest
    if room < (longest := max(map(len, told))):
        raise UserError(
            f"reversal.places: {num_facts} facts and a question take {longest + size - room} tokens, but a segment "
            f"has {size}: lower reversal.facts_per_text"
        )
    if not subject.split.num_tokens:
        raise UserError("reversal.places: there is no text to put the facts into")
    borders, generator = SentenceBorders(tokenizer), np.random.default_rng(settings.seed)

    def fill(facts: NDArray[np.int64], size: int) -> NDArray[np.int64]:
        begin, before = int(generator.integers(subject.split.num_tokens)), size - len(facts)
        text = np.take(subject.split.tokens, np.arange(begin, begin + before + SENTENCE_REACH), mode="wrap")
        after = borders.find_sentences(text)
        end = next((int(place) for place in after if place >= before), before)
        return np.concatenate([text[end - before : end], facts]).astype(np.int64)

    read = {"nothing": [NOTHING] * len(told)}
    if "memory" in settings.places and has_memory(model):
        read["memory"] = [fill(facts, size) for facts in told]
    if asks_here:
        read["context"] = [fill(facts, room) for facts in told]
    names = [group[0].relation for group in groups] * num_facts
    found: dict[str, dict[str, Any]] = {place: {} for place in PLACES if place in read}
    for place, texts in read.items():
        with model.fresh_memory(batch_size=len(groups)):
            if place == "memory":
                read_context(model, texts)
            for way, asked in questions.items():
                answers: list[Answer] = []
                for some in asked:
                    if place == "context":
                        some = [one._replace(opening=text) for one, text in zip(some, texts, strict=True)]
                    answers += score_answers(model, some)
                found[place][way] = count_hits(
                    names, [one.is_first for one in answers], [one.is_exact for one in answers]
                )
    return found


def _list_candidates(pairs: Sequence[ReversalPair], direction: Direction) -> list[tuple[str, list[str]]]:
    """List for each pair its prompt and its candidates: the sentence, then the prompt with each wrong answer."""
    get_parts = attrgetter("relation", f"{direction}_prompt", f"{direction}_answer")
    parts: list[tuple[str, str, str]] = [get_parts(pair) for pair in pairs]
    right, answers = set(parts), dict[str, dict[str, None]]()  # a dict keeps the order
    for relation, _, answer in parts:
        answers.setdefault(relation, {})[answer] = None
    found: list[tuple[str, list[str]]] = []
    for relation, prompt, answer in parts:
        others = [other for other in answers[relation] if (relation, prompt, other) not in right]
        found.append((prompt, [prompt + other for other in (answer, *others)]))
    return found


def _read(
    encoded: dict[str, np.ndarray], losses: dict[str, np.ndarray], prompt: np.ndarray, candidates: list[str]
) -> PairLosses:
    """Collect the losses of one prompt's candidates, of which the first is right."""
    sentence, losses_of_right = encoded[candidates[0]], losses[candidates[0]]
    shared = max(1, count_shared([encoded[text] for text in candidates]))
    totals = np.array([losses[text][shared - 1 :].sum() for text in candidates])  # losses begin with the second token
    answer = losses_of_right[max(1, count_shared([sentence, prompt])) - 1 :]
    return PairLosses(
        total_nll=float(losses_of_right.sum()),
        num_tokens=len(losses_of_right),
        answer_nll=float(answer.sum()),
        num_answer_tokens=len(answer),
        rank=float(rank_first(totals)),
        num_candidates=len(candidates),
    )


TABLES = {
    "perplexity of the sentences": ("{}_perplexity", "ratio", "gap"),
    "perplexity of the answers, given the prompt": ("{}_answer_perplexity", "answer_ratio"),
    "right answer first among the answers of its relation": ("{}_accuracy", "chance_accuracy"),
    "mean rank of the right answer": ("{}_mean_rank", "chance_mean_rank"),
}
"""The figures of each table, the first one in both directions."""


def make_column(scores: dict[str, Any], key: str, title: str, group: str = "") -> Column:
    """Make the column of a figure, with its interval if it has one."""
    low, high = scores["intervals"].get(key, (None, None))
    write = format_percent if key.endswith("accuracy") else format_number
    better = "higher" if key.endswith("accuracy") else "lower" if key.endswith("perplexity") else None
    return Column(key, title, scores[key], write, better, group, low=low, high=high)


@register_measure
class ReversalCurse(Measure):
    """How well a model knows facts forward, as trained, and backward."""

    name = "reversal"
    title = "the reversal curse"

    def run(self, subject: Subject) -> dict[str, Any]:
        """Return `ReversalResult.to_dict`, plus `text` (facts about the pairs) and `places` (see `ask_places`).

        Pairs that were taught backward (`data.reversal_taught`) are left out.

        Raises:
            UserError: the file of pairs can't be read, or `evaluate_reversal_curse` rejects them.
        """
        settings, own = subject.settings.reversal, get_reversal_pairs()
        taught = set(subject.facts.get("reversal_taught", ()))
        pairs = own if settings.pairs is None else read_reversal_pairs(settings.pairs)
        pairs = [pair for pair in pairs if pair.forward not in taught]
        if settings.pairs_per_relation is not None:
            pairs = draw_pairs(pairs, settings.pairs_per_relation, settings.seed)
        found = evaluate_reversal_curse(
            subject.model,
            subject.tokenizer,
            pairs,
            autocast=subject.autocast,
            on_progress=subject.on_progress,
            processes=subject.processes,
            **{name: value for name, value in vars(settings).items() if not name.startswith("pairs")},
        )
        places = ask_places(subject, pairs, found) if settings.places else {}
        known = {pair.forward for pair in own}
        text = {
            "source": "the project's own pairs" if settings.pairs is None else str(settings.pairs),
            "pairs_fingerprint": hashlib.sha256(
                "\n".join(map(repr, map(dataclasses.astuple, pairs))).encode()
            ).hexdigest(),
            "num_pairs": len(pairs),
            "num_relations": len({pair.relation for pair in pairs}),
            "num_own": sum(pair.forward in known for pair in pairs),
            "num_trained": subject.facts.get("reversal_sentences"),
            "num_taught": len(taught),
        }
        return found.to_dict() | {"text": text, "places": places}

    def columns(self, result: dict[str, Any]) -> list[Column]:
        """Return both perplexities, their ratio (1 is best) and gap (0 is best), and both accuracies."""
        titles = {f"{way}_perplexity": way for way in DIRECTIONS} | {"ratio": "ratio", "gap": "gap"}
        titles |= {f"{way}_accuracy": f"{way} first" for way in DIRECTIONS}
        return [make_column(result, key, title, "Reversal curse") for key, title in titles.items()]

    def contrasts(self, result: dict[str, Any]) -> dict[str, tuple[DocumentLosses, DocumentLosses]]:
        """Return pairs of hit rates for each place.

        Weights: ranked first, compared with chance. Memory and context: exact answers compared with nothing read, and
        backward also the share of names ranked first, compared with chance. All: exact answers backward and forward.
        """
        found: dict[str, tuple[DocumentLosses, DocumentLosses]] = {}
        places = dict(result.get("places", {}))
        nothing = places.pop("nothing", {})

        def share(hits: dict[str, Any], key: str) -> DocumentLosses:
            return DocumentLosses.read(hits["num_questions"], hits[key])

        for place, ways in places.items():
            for way, hits in ways.items():
                if place == "weights" or way == "backward":
                    found[f"{PLACES[place]}, {way}, first − chance"] = share(hits, "first"), share(hits, "chance")
                if place != "weights":
                    pair = share(hits, "exact"), share(nothing[way], "exact")
                    found[f"{PLACES[place]}, {way}, exact − nothing read"] = pair
            backward, forward = share(ways["backward"], "exact"), share(ways["forward"], "exact")
            found[f"{PLACES[place]}, exact, backward − forward"] = backward, forward
        return found

    def tables(self, result: dict[str, Any]) -> list[Table]:
        """Return rows for all pairs, each kind and each relation; and the hit rates by place."""
        groups = {"all pairs": result}
        if len(result["by_kind"]) > 1:
            groups |= {f"{kind} facts": scores for kind, scores in result["by_kind"].items()}
        if len(result["per_relation"]) > 1:
            groups |= {entry["relation"].replace("_", " "): entry for entry in result["per_relation"]}
        tables: list[Table] = []
        for title, (first, *others) in TABLES.items():
            keys = [*map(first.format, DIRECTIONS), *others]
            rows = []
            for name, scores in groups.items():
                columns = [make_column(scores, key, key.partition("_")[0].replace("answer", "ratio")) for key in keys]
                rows.append((name, [Column("num_pairs", "pairs", scores["num_pairs"], format_count), *columns]))
            tables.append(Table(title, rows))
        for key, title in (("first", "right answer first"), ("exact", "exact answers")):
            rows = []
            for place, ways in result.get("places", {}).items():
                shares = {way: sum(hits[key]) / sum(hits["num_questions"]) for way, hits in ways.items()}
                columns = [Column(way, way, share, format_percent, "higher") for way, share in shares.items()]
                rows.append((PLACES[place], columns))
            if rows:
                tables.append(Table(f"by place of the knowledge, {title}", rows, is_for_studies=True))
        return tables

    def notes(self, result: dict[str, Any]) -> list[str]:
        """State which pairs were measured, whether they were trained on, and how intervals were computed."""
        text, bootstrap, trained = result["text"], result["bootstrap"], result["text"]["num_trained"]
        what = "It is unknown whether the training text contained forward sentences."
        if trained is not None:
            what = f"The training text contained {format_plural(trained, 'sentence')} of the project's own pairs"
            what += f"; {text['num_own']} of the measured pairs are the project's own."
        if text.get("num_taught"):
            what += f" Also taught backward, and not measured: {format_plural(text['num_taught'], 'pair')}."
        return [
            f"{format_plural(text['num_pairs'], 'pair')} in {format_plural(text['num_relations'], 'relation')}. {what}",
            f"{bootstrap['confidence']:.0%} intervals from {bootstrap['num_resamples']:,} bootstrap resamples.",
        ]

    def charts(self, results: Sequence[ModelResult]) -> list[Chart]:
        """Draw the share of right answers ranked first, forward and backward, and by place."""
        rows: list[dict[str, Any]] = []
        for name, result in results:
            for way in DIRECTIONS:
                low, high = result["intervals"][f"{way}_accuracy"]
                share = result[f"{way}_accuracy"]
                rows.append({"model": name, "direction": way, "share": share, "low": low, "high": high})
        caption = "Share of pairs whose right answer ranks first among the answers of its relation."
        axes: dict[str, Any] = {"x": "model", "y": "share", "series": "direction", "low": "low", "high": "high"}
        charts = [bar_chart("reversal", "The reversal curse", caption, rows, **axes, y_format=".0%")]
        caption = "Share of questions whose right answer ranks first. “Nothing read” is what the model guesses."
        for way in DIRECTIONS:
            rows = []
            for name, result in results:
                for place, ways in result.get("places", {}).items():
                    share = sum(ways[way]["first"]) / sum(ways[way]["num_questions"])
                    rows.append({"model": name, "place": PLACES[place], "share": share})
            if rows:
                axes = {"x": "model", "y": "share", "series": "place", "y_format": ".0%", "view": way}
                charts.append(bar_chart(f"reversal-{way}", "Knowledge in three places", caption, rows, **axes))
        return charts

    def describe(self, result: dict[str, Any]) -> str:
        """State both perplexities, their ratio and gap, and both accuracies."""
        return (
            f"reversal: perplexity {result['forward_perplexity']:,.1f} forward and "
            f"{result['backward_perplexity']:,.1f} backward, ratio {result['ratio']:.3g}, gap {result['gap']:,.1f}; "
            f"the right answer first in {result['forward_accuracy']:.0%} and {result['backward_accuracy']:.0%} of pairs"
        )
