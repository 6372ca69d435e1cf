"""A cache around any trained model, which predicts from earlier parts of the same text. It needs no training.

After the tokens x_1 … x_t, with h_i the head's input at token i, the cache predicts the next token w by these
components:

    states    p(w) ∝ Σ_{i = max(1, t − N)}^{t − 1} exp(θ sim(h_t, h_i)) [x_{i+1} = w]
    n-grams   p(w) = how often w followed the last n − 1 tokens in x_1 … x_t / how often anything did
    match     p(w) = [x_{i+1} = w], where x_{i−L+1} … x_i is the latest earlier occurrence of the longest suffix of the
              text that occurs earlier in it

The result is their linear mixture with the model's own distribution,

    p(w) = Σ_k λ_k p_k(w) / Σ_k λ_k,    over the components k that have a prediction here.

The weights λ depend on the longest context that occurred before: up to n − 1 tokens for n-grams, L for a match. So a
bigram can weigh more if no trigram is known. Contexts of three tokens and more are further distinguished by their
information, the sum over their tokens of log2((i + 1) / (c + 1)), where i tokens of the text precede the token, c of
them equal to it. A match can thus weigh more if it repeats something rare, such as the digits of a number
(`MATCH_BITS`).

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
"""Maximum length of a match in tokens; longer matches count as equally long."""
KEY_LENGTH = 4
"""Number of tokens by which earlier positions are looked up; the candidates found are compared one by one."""
QUERY_ROWS, QUERY_ROWS_ON_GPU = 256, 4096
"""Number of positions compared with earlier states at once: many on a GPU, where launches are slow, few on a CPU, whose
cache is small."""
MIN_MODEL_WEIGHT = 1e-3
"""Minimum weight that tuning gives the model, so that no token becomes impossible."""
EM_STEPS, EM_TOLERANCE = 50, 1e-4
"""EM stops after this many steps, or once no weight changes by as much as this tolerance."""
PRIOR_TOKENS = 20
"""Weight, in tokens, of the prior in tuning the weights of long contexts, which are rare; see `tune_weights`."""


# States


def prepare_states(states: Tensor, similarity: Literal["cosine", "dot"]) -> Tensor:
    """States [T, D], float32 or wider, scaled so that their inner products are the similarities."""
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    return torch.nn.functional.normalize(wide, dim=-1) if similarity == "cosine" else wide


def compare_states(states: Tensor, begin: int, end: int, num_states: int) -> tuple[Tensor, int]:
    """Similarities of states begin … end − 1 to the `num_states` states before each.

    Args:
        states: from `prepare_states`, [P, D].
        begin: index of the first state to compare.
        end: index of the last one, plus 1.
        num_states: N.

    Returns:
        Similarities [end − begin, K], K ≥ 1, −∞ for states that are not among the N before; and the index of the state
        in column 0.
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
    """The probability of each target in the cache of states; see the module's equation.

    Args:
        states: from `prepare_states`, [P + T, D]: P earlier tokens', then those of the T tokens that predict.
        tokens: the tokens at these positions, [P + T].
        targets: the token after each of the last T positions, [T].
        num_states: N.
        thetas: Θ values of θ.

    Returns:
        [T, Θ]; NaN at a text's first token, which has no state before it.
    """
    start = len(states) - len(targets)
    rows = QUERY_ROWS_ON_GPU if states.is_cuda else QUERY_ROWS
    found = torch.full((len(targets), len(thetas)), torch.nan, dtype=states.dtype, device=states.device)
    for begin in range(start, len(states), rows):
        end = min(begin + rows, len(states))
        similarities, first = compare_states(states, begin, end, num_states)
        followers = tokens[first + 1 : first + 1 + similarities.shape[1]]
        if not len(followers):  # only the text's first token
            continue
        is_target = (followers == targets[begin - start : end - start].unsqueeze(1)).to(similarities.dtype)
        for place, theta in enumerate(thetas):
            shares = (similarities * theta).softmax(-1)
            found[begin - start : end - start, place] = shares.mul_(is_target).sum(-1)
    return found.double().cpu().numpy()


class Scored(NamedTuple):
    """What the components predict for each of T tokens.

    Attributes:
        probabilities: the token's probability by each component, in the order of `COMPONENTS`, [T, 6]; NaN if the
            component is off or has no prediction.
        contexts: `rank_context` of the longest context that occurred before, [T].
    """

    probabilities: Probabilities
    contexts: NDArray[np.int64]


def rank_context(lengths: Any, bits: Any = 0.0) -> Any:
    """The rows of `CacheConfig.weights` for contexts of these lengths (−1: none) and bits of information."""
    return np.where(lengths < MAX_ORDER, lengths, MAX_ORDER + np.searchsorted(MATCH_BITS, bits, side="right")) + 1


# n-grams and matches


def score_ngrams(tokens: NDArray[np.int64], order: int) -> Probabilities:
    """The n-gram probabilities of `TextCache.score` for a whole text at once: [T − 1, order] for T tokens.

    A token's probability is the number of earlier occurrences of the n-gram that ends in it, divided by the number of
    earlier occurrences of that n-gram's context.
    """
    found = np.full((len(tokens), order), np.nan)
    for length, known in enumerate(itertools.islice(_number_contexts(tokens), order)):
        seen = _find_earlier(known)[0]
        grams = _find_earlier(known * (tokens.max() + 1) + tokens[length:])[0]
        found[length:, length] = np.divide(grams, seen, out=np.full(len(seen), np.nan), where=seen > 0)
    return found[1:]


def score_match(tokens: NDArray[np.int64]) -> tuple[Probabilities, NDArray[np.int64]]:
    """The match probabilities and contexts of `TextCache.score` for a whole text at once: [T − 1] each for T tokens."""
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
    """For each length 0, 1, 2, …: the contexts of that length, one per token that has one, numbered by content."""
    contexts = np.zeros(len(tokens), dtype=np.int64)
    for length in range(len(tokens)):
        yield contexts
        _, grams = np.unique(contexts * (tokens.max() + 1) + tokens[length:], return_inverse=True)
        contexts = grams[:-1]


def _find_earlier(items: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each item, how many equal items precede it, and the index of the last of these (−1: none)."""
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
        self.counts: dict[tuple[int, ...], dict[int, int]] = {}  # by context: how often each token followed it
        self.totals: dict[tuple[int, ...], int] = {}  # by context: the sum of these counts
        self.recent: tuple[int, ...] = ()  # the last order − 1 tokens

    def read(self, token: int) -> None:
        """Count the text's next token."""
        for context in self.contexts():
            followers = self.counts.setdefault(context, {})
            followers[token] = followers.get(token, 0) + 1
            self.totals[context] = self.totals.get(context, 0) + 1
        self.recent = (*self.recent, token)[1 - self.order :] if self.order > 1 else ()

    def unread(self, token: int, recent: tuple[int, ...]) -> None:
        """Undo `read(token)`; `recent` is what `self.recent` was before it."""
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
        """The contexts at the text's end: its last 0, 1, … order − 1 tokens."""
        return (self.recent[len(self.recent) - n :] for n in range(len(self.recent) + 1))

    def followers(self) -> list[tuple[dict[int, int], int]]:
        """For each known context at the text's end, shortest first: its followers' counts, and their sum."""
        known = itertools.takewhile(self.totals.__contains__, self.contexts())  # if one is unknown, so are longer ones
        return [(self.counts[context], self.totals[context]) for context in known]


class MatchFinder:
    """Finds the longest suffix of a text that occurs earlier in it."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.counts: dict[int, int] = {}  # of each token
        self.bits = [0.0]  # information of the text's first 0, 1, … tokens
        self.latest: dict[tuple[int, ...], int] = {}  # position where each run of 1 to KEY_LENGTH tokens last ended
        # for each token: where the runs of 1, 2, … tokens that end in it previously ended; −1: nowhere
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
        """The suffix's context as `rank_context` numbers it, and the token that followed its occurrence (−1: none)."""
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


# All components


class TextCache:
    """The cache of one text.

    Args:
        config: what is cached, and how it is mixed.
    """

    def __init__(self, config: CacheConfig) -> None:
        self.config = config
        self.states: Tensor | None = None  # of the last N tokens, [n, D]; the last one's follower is not known yet
        self.tokens: Tensor | None = None  # those tokens, [n]
        self.counts = FollowerCounts(config.ngram_order) if config.ngram_order else None
        self.matches = MatchFinder() if config.longest_match else None

    @torch.no_grad()
    def add(self, states: Tensor, tokens: Tensor) -> None:
        """Add the text's next tokens [T] and their states [T, D] to the cache."""
        num_states = self.config.num_states
        if num_states:
            states, tokens_here = self._join(states, tokens)
            self.states, self.tokens = states[-num_states:].clone(), tokens_here[-num_states:].clone()
        for token in tokens.tolist():
            self._read(token)

    @torch.no_grad()
    def score(self, states: Tensor, tokens: Tensor, targets: Tensor) -> Scored:
        """Score the targets after the text's next T tokens, which are not added to the cache.

        Args:
            states: [T, D].
            tokens: [T].
            targets: the token after each of them, [T].

        Returns:
            The components' predictions; column 0, the model's, is NaN.
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
        """The mixture's distributions, [R, Z], after the last R of the text's next T tokens.

        The tokens are not added to the cache.

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
        """Read the next tokens one by one, yielding each one's index after it is read; in the end, undo all of them."""
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
        scored: from `TextCache.score`, with the model's probabilities filled into column 0.
        weights: λ by context (see `rank_context`) and component, [8, 6].
    """
    is_known = ~np.isnan(scored.probabilities)
    chosen = np.asarray(weights)[scored.contexts] * is_known
    return (chosen * np.where(is_known, scored.probabilities, 0)).sum(1) / chosen.sum(1)


def tune_weights(scored: Scored, start: Sequence[Sequence[float]]) -> Probabilities:
    """The weights, [8, 6], under which held-out text is most probable, by expectation maximisation.

    λ_k ← mean over the tokens of λ_k p_k / Σ_j λ_j p_j, separately for each kind of context. For contexts that only
    matches have, the weights of the previous kind act as a prior worth `PRIOR_TOKENS` tokens. The objective is concave
    in λ, so EM's starting point does not matter.

    Args:
        scored: as for `mix`.
        start: weights for kinds of context that do not occur in the text, [8, 6].
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


def describe_cache(config: CacheConfig, hidden_size: int, vocab_size: int) -> dict[str, int]:
    """The storage that a text's cache needs.

    Returns:
        `state_numbers`, N (D + 1), and their `state_bytes` in float32; `bytes_per_token` of the text itself, which
        n-grams and matches need: 2 for a vocabulary of at most 65,536, else 4. Lookup tables don't count, since they
        can be rebuilt from the text.
    """
    id_bytes = 2 if vocab_size <= 1 << 16 else 4
    return {
        "state_numbers": config.num_states * (hidden_size + 1),
        "state_bytes": config.num_states * (4 * hidden_size + id_bytes),
        "bytes_per_token": id_bytes if config.ngram_order or config.longest_match else 0,
    }
