"""A cache around any trained model: what followed earlier in the same text. Nothing of it is trained.

After the tokens x_1 … x_t, with h_i the head's input at token i, the components of the next token's distribution are

    states    p(w) ∝ Σ_{i = max(1, t − N)}^{t − 1} exp(θ sim(h_t, h_i)) [x_{i+1} = w]
    n-grams   p(w) = how often w followed the last n − 1 tokens in x_1 … x_t / how often anything did
    match     p(w) = [x_{i+1} = w], where x_{i−L+1} … x_i is the longest end of the text that stands in it before, and
              of equally long ones the latest

and the cached model is their linear mixture with the model's own distribution,

    p(w) = Σ_k λ_k p_k(w) / Σ_k λ_k,    k over the components that know anything here.

The weights λ depend on the longest context whose followers are known: at most n − 1 tokens, or with a match L. So a
bigram can weigh more where there is no trigram. Contexts of three tokens and more are told apart by their information,
the sum over their tokens of log2((i + 1) / (c + 1)), where the text had i tokens before, c of them equal: a match
weighs more the rarer what it repeats, as the digits of a number are (`MATCH_BITS`).

Sources: Improving Neural Language Models with a Continuous Cache, arXiv:1612.04426, eq. 2 to 5 (states); Kuhn and De
Mori, A Cache-Based Natural Language Model for Speech Recognition, IEEE PAMI 12(6), 1990 (n-grams of the text itself);
Jelinek and Mercer, Interpolated Estimation of Markov Source Parameters from Sparse Data, 1980 (weights by context, set
by EM on held-out text); Cleary and Teahan, Unbounded Length Contexts for PPM, The Computer Journal 40(2/3), 1997, and
Infini-gram, arXiv:2401.17377 (the longest match).
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from new_llm.config.model import COMPONENTS, MATCH_BITS, MAX_ORDER, CacheConfig

Probabilities = NDArray[np.float64]
MATCH = COMPONENTS.index("match")
LONGEST_MATCH = 32
"""Tokens by which a match is told from others: longer ones count as equally long."""
KEY_LENGTH = 4
"""Tokens by which earlier places are looked up; those that share them are compared one by one."""
QUERY_ROWS, QUERY_ROWS_ON_GPU = 256, 4096
"""Positions that are compared with the states before them at once: a GPU is slow to start, a CPU has a small cache."""
MIN_MODEL_WEIGHT = 1e-3
"""Least weight that tuning gives the model, so that no token is impossible."""
EM_STEPS, EM_TOLERANCE = 50, 1e-4
"""EM ends after this many steps, or with the first that changes no weight by more than this."""
PRIOR_TOKENS = 20
"""Tokens that the weights of shorter contexts count for in the weights of long ones, of which a text has few."""


# States


def prepare_states(states: Tensor, similarity: Literal["cosine", "dot"]) -> Tensor:
    """States whose inner products are their similarities, float32 or wider, [T, D]."""
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    return torch.nn.functional.normalize(wide, dim=-1) if similarity == "cosine" else wide


def compare_states(states: Tensor, begin: int, end: int, num_states: int) -> tuple[Tensor, int]:
    """Similarities of the states [begin, end) with the `num_states` before each; −∞ elsewhere.

    Args:
        states: of `prepare_states`, [P, D].
        begin: index of the first state that asks.
        end: one past the last.
        num_states: N.

    Returns:
        [end − begin, K], and the index of the state that column 0 stands for; K ≥ 1.
    """
    first = max(0, begin - num_states)
    with torch.autocast(states.device.type, enabled=False):
        found = states[begin:end] @ states[first : max(first + 1, end - 1)].T
    asks = torch.arange(begin, end, device=states.device).unsqueeze(1)
    keys = torch.arange(first, first + found.shape[1], device=states.device)
    return found.masked_fill_((keys >= asks) | (keys < asks - num_states), -torch.inf), first


def score_states(
    states: Tensor, tokens: Tensor, targets: Tensor, num_states: int, thetas: Sequence[float]
) -> Probabilities:
    """The probability of each target by the states before it; see the module's equation.

    Args:
        states: of `prepare_states`, those of P earlier tokens and of the T that predict, [P + T, D].
        tokens: what was read there, [P + T].
        targets: the token that follows each of the last T, [T].
        num_states: N.
        thetas: Θ values of θ.

    Returns:
        [T, Θ]; NaN at a text's first token, which no state comes before.
    """
    start = len(states) - len(targets)
    rows = QUERY_ROWS_ON_GPU if states.is_cuda else QUERY_ROWS
    found = torch.full((len(targets), len(thetas)), torch.nan, dtype=states.dtype, device=states.device)
    for begin in range(start, len(states), rows):
        end = min(begin + rows, len(states))
        similarities, first = compare_states(states, begin, end, num_states)
        followers = tokens[first + 1 : first + 1 + similarities.shape[1]]
        if not len(followers):  # the first token alone
            continue
        is_target = (followers == targets[begin - start : end - start].unsqueeze(1)).to(similarities.dtype)
        for place, theta in enumerate(thetas):
            shares = (similarities * theta).softmax(-1)
            found[begin - start : end - start, place] = shares.mul_(is_target).sum(-1)
    return found.double().cpu().numpy()


class Scored(NamedTuple):
    """What the components know of each of T tokens.

    Attributes:
        probabilities: the token's by each component, in the order of `COMPONENTS`, [T, 6]; NaN where one is off or
            knows nothing.
        contexts: of `rank_context` for the longest context whose followers are known, [T].
    """

    probabilities: Probabilities
    contexts: NDArray[np.int64]


def rank_context(lengths: Any, bits: Any = 0.0) -> Any:
    """The row of `CacheConfig.weights` for a context of so many tokens and so much information; −1 tokens: there is
    none. Numbers or arrays."""
    return np.where(lengths < MAX_ORDER, lengths, MAX_ORDER + np.searchsorted(MATCH_BITS, bits, side="right")) + 1


# n-grams and matches


def score_ngrams(tokens: NDArray[np.int64], order: int) -> Probabilities:
    """What `TextCache.score` finds for a whole text's n-grams, all tokens at once: [T − 1, order] for T tokens.

    The n-gram that ends in a token has been seen as often as an equal one stands before it, and its context has been
    followed by something as often.
    """
    found = np.full((len(tokens), order), np.nan)
    for length, known in enumerate(itertools.islice(_number_contexts(tokens), order)):
        seen = _find_earlier(known)[0]
        grams = _find_earlier(known * (tokens.max() + 1) + tokens[length:])[0]
        found[length:, length] = np.divide(grams, seen, out=np.full(len(seen), np.nan), where=seen > 0)
    return found[1:]


def score_match(tokens: NDArray[np.int64]) -> tuple[Probabilities, NDArray[np.int64]]:
    """What `TextCache.score` finds for a whole text's matches: probabilities and contexts, [T − 1] for T tokens."""
    found, lengths = np.full(len(tokens), np.nan), np.zeros(len(tokens), np.int64)
    counts, _ = _find_earlier(tokens)
    bits = np.concatenate([np.zeros(1), np.log2((np.arange(len(tokens)) + 1) / (counts + 1)).cumsum()])
    for length, known in itertools.islice(enumerate(_number_contexts(tokens)), 1, LONGEST_MATCH + 1):
        latest = _find_earlier(known)[1]
        places = np.flatnonzero(latest >= 0)
        if not len(places):
            break
        found[length + places] = tokens[length + latest[places]] == tokens[length + places]
        lengths[length + places] = length
    places = np.arange(len(tokens))
    return found[1:], rank_context(lengths, bits[places] - bits[places - lengths])[1:]


def _number_contexts(tokens: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """For 0, 1, 2, … tokens the contexts of this length, one before each token that has one, as numbers."""
    contexts = np.zeros(len(tokens), dtype=np.int64)
    for length in range(len(tokens)):
        yield contexts
        _, grams = np.unique(contexts * (tokens.max() + 1) + tokens[length:], return_inverse=True)
        contexts = grams[:-1]


def _find_earlier(items: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many equal items precede each item, and the index of the last of them; −1: there is none."""
    order = np.argsort(items, kind="stable")
    is_first = np.diff(items[order], prepend=-1) != 0
    places = np.arange(len(items))
    counts, latest = np.empty(len(items), np.int64), np.empty(len(items), np.int64)
    counts[order] = places - np.maximum.accumulate(np.where(is_first, places, 0))
    latest[order] = np.where(is_first, -1, np.roll(order, 1))
    return counts, latest


class FollowerCounts:
    """How often each token followed each context of up to `order` − 1 tokens in a text.

    Args:
        order: the longest n-gram's n, at least 1.
    """

    def __init__(self, order: int) -> None:
        self.order = order
        self.counts: dict[tuple[int, ...], dict[int, int]] = {}  # followers of each context
        self.totals: dict[tuple[int, ...], int] = {}  # their sum
        self.recent: tuple[int, ...] = ()  # the last order − 1 tokens

    def read(self, token: int) -> None:
        """Count the text's next token."""
        for context in self.contexts():
            followers = self.counts.setdefault(context, {})
            followers[token] = followers.get(token, 0) + 1
            self.totals[context] = self.totals.get(context, 0) + 1
        self.recent = (*self.recent, token)[1 - self.order :] if self.order > 1 else ()

    def unread(self, token: int, recent: tuple[int, ...]) -> None:
        """Undo `read(token)`, before which the last tokens were `recent`."""
        self.recent = recent
        for context in self.contexts():
            followers = self.counts[context]
            followers[token] -= 1
            self.totals[context] -= 1
            if not followers[token]:
                del followers[token]
            if not self.totals[context]:
                del self.counts[context], self.totals[context]

    def contexts(self) -> Iterable[tuple[int, ...]]:
        """The last 0, 1, … order − 1 tokens, as far as there are that many."""
        return (self.recent[len(self.recent) - n :] for n in range(len(self.recent) + 1))

    def followers(self) -> list[tuple[dict[int, int], int]]:
        """What followed each of the last contexts that has been seen, how often each, and all together."""
        known = itertools.takewhile(self.totals.__contains__, self.contexts())  # no longer one than that has been seen
        return [(self.counts[context], self.totals[context]) for context in known]


class MatchFinder:
    """The longest end of a text that stands in it before."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.counts: dict[int, int] = {}  # of each token
        self.bits = [0.0]  # the information of the text's first 0, 1, … tokens
        self.latest: dict[tuple[int, ...], int] = {}  # where each run of 1 to KEY_LENGTH tokens ended last
        # for each token, where the runs of 1, 2, … tokens that end in it had ended before; −1: nowhere
        self.before: list[list[int]] = []

    def read(self, token: int) -> None:
        """Read the text's next token."""
        count = self.counts.get(token, 0) + 1
        self.counts[token] = count
        self.tokens.append(token)
        self.bits.append(self.bits[-1] + float(np.log2(len(self.tokens) / count)))
        self.before.append([])
        for run in self._list_runs():
            self.before[-1].append(self.latest.get(run, -1))
            self.latest[run] = len(self.tokens) - 1

    def unread(self) -> None:
        """Undo the last `read`."""
        for run, place in zip(self._list_runs(), self.before.pop(), strict=True):
            if place < 0:
                del self.latest[run]
            else:
                self.latest[run] = place
        token = self.tokens.pop()
        self.counts[token] -= 1
        if not self.counts[token]:
            del self.counts[token]
        del self.bits[-1]

    def find(self) -> tuple[int, int]:
        """Its context, of `rank_context`, and the token that followed it; −1: there is none."""
        here = len(self.tokens) - 1
        length, found = next(
            ((length, place) for length, place in reversed(list(enumerate(self.before[here], start=1))) if place >= 0),
            (0, -1),
        )
        place = found if length == KEY_LENGTH else -1
        while place >= 0 and length < LONGEST_MATCH:
            shared = KEY_LENGTH
            while shared < min(place + 1, LONGEST_MATCH) and self.tokens[place - shared] == self.tokens[here - shared]:
                shared += 1
            if shared > length:
                length, found = shared, place
            earlier = self.before[place]
            place = earlier[-1] if len(earlier) == KEY_LENGTH else -1
        context = int(rank_context(length, self.bits[-1] - self.bits[-1 - length]))
        return context, self.tokens[found + 1] if length else -1

    def _list_runs(self) -> list[tuple[int, ...]]:
        return [tuple(self.tokens[-length:]) for length in range(1, 1 + min(KEY_LENGTH, len(self.tokens)))]


# All


class TextCache:
    """The cache of one text.

    Args:
        config: what is cached, and how it is mixed.
    """

    def __init__(self, config: CacheConfig) -> None:
        self.config = config
        self.states: Tensor | None = None  # of the last N tokens, [n, D]; the follower of the last is not known yet
        self.tokens: Tensor | None = None  # those tokens, [n]
        self.counts = FollowerCounts(config.ngram_order) if config.ngram_order else None
        self.matches = MatchFinder() if config.longest_match else None

    @torch.no_grad()
    def add(self, states: Tensor, tokens: Tensor) -> None:
        """Remember the text's next tokens [T] and their states [T, D]."""
        num_states = self.config.num_states
        if num_states:
            states, tokens_here = self._join(states, tokens)
            self.states, self.tokens = states[-num_states:].clone(), tokens_here[-num_states:].clone()
        for token in tokens.tolist():
            self._read(token)

    @torch.no_grad()
    def score(self, states: Tensor, tokens: Tensor, targets: Tensor) -> Scored:
        """What the components know of the token after each of the text's next tokens, which are not kept.

        Args:
            states: [T, D].
            tokens: [T].
            targets: [T].

        Returns:
            Its probabilities are NaN for the model.
        """
        found, contexts = np.full((len(tokens), len(COMPONENTS)), np.nan), np.zeros(len(tokens), np.int64)
        if self.config.num_states:
            joined, read = self._join(states, tokens)
            found[:, 1:2] = score_states(joined, read, targets, self.config.num_states, [self.config.theta])
        for place in self._scan(tokens):
            if self.counts:
                target = int(targets[place])
                scores = [one.get(target, 0) / total for one, total in self.counts.followers()]
                found[place, 2 : 2 + len(scores)] = scores
                contexts[place] = len(scores)
            if self.matches:
                contexts[place], follower = self.matches.find()
                if follower >= 0:
                    found[place, MATCH] = follower == int(targets[place])
        return Scored(found, contexts)

    @torch.no_grad()
    def mix(self, states: Tensor, tokens: Tensor, probabilities: Tensor) -> Tensor:
        """The mixture's distribution after each of the last R of the text's next tokens, which are not kept, [R, Z].

        Args:
            states: [T, D].
            tokens: [T].
            probabilities: the model's distributions, [R, Z].
        """
        skipped = len(tokens) - len(probabilities)
        parts: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in probabilities]
        contexts = [0] * len(probabilities)
        if self.config.num_states:
            joined, read = self._join(states, tokens)
            for place in range(len(joined) - len(probabilities), len(joined)):
                if place:
                    found, first = compare_states(joined, place, place + 1, self.config.num_states)
                    shares = (found[0].double() * self.config.theta).softmax(-1)
                    parts[place - len(joined)][1] = read[first + 1 : place + 1], shares
        for place in self._scan(tokens):
            row = place - skipped
            if self.counts and row >= 0:
                for component, (one, total) in enumerate(self.counts.followers(), start=2):
                    shares = torch.tensor(list(one.values()), dtype=torch.float64) / total
                    parts[row][component] = torch.tensor(list(one)), shares
                    contexts[row] = component - 1
            if self.matches and row >= 0:
                contexts[row], follower = self.matches.find()
                if follower >= 0:
                    parts[row][MATCH] = torch.tensor([follower]), torch.ones(1, dtype=torch.float64)
        mixed = probabilities.clone()
        for row, found, place in zip(mixed, parts, contexts, strict=True):
            weights = self.config.weights[place]
            total = weights[0] + sum(weights[component] for component in found)
            row *= weights[0] / total
            for component, (followers, shares) in found.items():
                row.index_add_(0, followers.to(row.device), shares.to(row) * (weights[component] / total))
        return mixed

    def _read(self, token: int) -> None:
        if self.counts:
            self.counts.read(token)
        if self.matches:
            self.matches.read(token)

    def _scan(self, tokens: Tensor) -> Iterator[int]:
        """Read the next tokens one by one, each before its place is yielded; in the end all is as it was."""
        if not (self.counts or self.matches):
            return
        befores: list[tuple[int, ...]] = []
        ids = tokens.tolist()
        for place, token in enumerate(ids):
            befores.append(self.counts.recent if self.counts else ())
            self._read(token)
            yield place
        for token, recent in zip(reversed(ids), reversed(befores), strict=True):
            if self.counts:
                self.counts.unread(token, recent)
            if self.matches:
                self.matches.unread()

    def _join(self, states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        states = prepare_states(states, self.config.similarity)
        if self.states is None or self.tokens is None:
            return states, tokens
        return torch.cat([self.states, states]), torch.cat([self.tokens, tokens])


def mix(scored: Scored, weights: Sequence[Sequence[float]] | Probabilities) -> Probabilities:
    """The mixture's probability of each target, [T].

    Args:
        scored: of `TextCache.score`, with the model's probabilities in column 0.
        weights: λ by the longest context that is known, [8, 6].
    """
    is_known = ~np.isnan(scored.probabilities)
    chosen = np.asarray(weights)[scored.contexts] * is_known
    return (chosen * np.where(is_known, scored.probabilities, 0)).sum(1) / chosen.sum(1)


def tune_weights(scored: Scored, start: Sequence[Sequence[float]]) -> Probabilities:
    """The weights that make held-out text most probable, by expectation maximisation, [8, 6].

    λ_k ← mean over the tokens of λ_k p_k / Σ_j λ_j p_j, for each kind of context by itself; contexts that only
    a match has are joined by `PRIOR_TOKENS` tokens, shared out by the weights of the range before. What is maximised is
    concave in λ, so that EM's own start does not matter.

    Args:
        scored: as for `mix`.
        start: the weights of contexts that no token of the text has, [8, 6].
    """
    tuned = np.array(start, dtype=np.float64)
    for place in range(len(tuned)):
        rows = np.nan_to_num(scored.probabilities[scored.contexts == place])
        if not len(rows):
            continue
        weights = np.full(len(COMPONENTS), 1 / len(COMPONENTS))
        prior = tuned[place - 1] * (PRIOR_TOKENS if place > MAX_ORDER else 0)
        for _ in range(EM_STEPS):
            before = weights.copy()
            weights *= (1 / np.maximum(rows @ weights, np.finfo(np.float64).tiny)) @ rows
            weights = (weights + prior) / (len(rows) + prior.sum())
            weights[0] = max(weights[0], MIN_MODEL_WEIGHT)
            weights /= weights.sum()
            if np.abs(weights - before).max() < EM_TOLERANCE:
                break
        tuned[place] = weights
    return tuned


def describe_cache(config: CacheConfig, hidden_size: int, vocab_size: int, element_bytes: int = 4) -> dict[str, int]:
    """How much a text's cache stores.

    Returns:
        `state_numbers` N (D + 1) and their `state_bytes`; `bytes_per_token` of the text itself, which n-grams and
        matches are looked up in: 2 for a vocabulary of at most 65,536. Tables that find them faster can be made of it.
    """
    id_bytes = 2 if vocab_size <= 1 << 16 else 4
    return {
        "state_numbers": config.num_states * (hidden_size + 1),
        "state_bytes": config.num_states * (hidden_size * element_bytes + id_bytes),
        "bytes_per_token": id_bytes if config.ngram_order or config.longest_match else 0,
    }
