"""A cache around any trained model: what followed earlier in the same text. Nothing of it is trained.

After the tokens x_1 … x_t, with h_i the head's input at token i, the components of the next token's distribution are

    states    p(w) ∝ Σ_{i = max(1, t − N)}^{t − 1} exp(θ sim(h_t, h_i)) [x_{i+1} = w]
    n-grams   p(w) = how often w followed the last n − 1 tokens in x_1 … x_t / how often anything did

and the cached model is their linear mixture with the model's own distribution,

    p(w) = Σ_k λ_k p_k(w) / Σ_k λ_k,    k over the components that know anything here.

The weights λ depend on the longest context whose followers are known (0: none; 1: the empty one; 2: the last token; 3:
the last two), so that a bigram can weigh more where there is no trigram.

Sources: Improving Neural Language Models with a Continuous Cache, arXiv:1612.04426, eq. 2 to 5 (states); Kuhn and De
Mori, A Cache-Based Natural Language Model for Speech Recognition, IEEE PAMI 12(6), 1990 (n-grams of the text itself);
Jelinek and Mercer, Interpolated Estimation of Markov Source Parameters from Sparse Data, 1980 (weights by context, set
by EM on held-out text).
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from new_llm.config.model import COMPONENTS, CacheConfig

Probabilities = NDArray[np.float64]
QUERY_ROWS, QUERY_ROWS_ON_GPU = 256, 4096
"""Positions that are compared with the states before them at once: a GPU is slow to start, a CPU has a small cache."""
MIN_MODEL_WEIGHT = 1e-3
"""Least weight that tuning gives the model, so that no token is impossible."""
EM_STEPS, EM_TOLERANCE = 50, 1e-4
"""EM ends after so many steps, or with the first that changes no weight by more than this."""


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


# n-grams


def score_ngrams(tokens: NDArray[np.int64], order: int) -> Probabilities:
    """What `TextCache.score` finds for a whole text's n-grams, all tokens at once: [T − 1, order] for T tokens.

    The n-gram that ends in a token has been seen as often as an equal one stands before it, and its context has been
    followed by something as often.
    """
    found = np.full((len(tokens), order), np.nan)
    contexts = np.zeros(len(tokens), dtype=np.int64)  # of each token, those of one kind with one number
    for length in range(min(order, len(tokens))):
        known = contexts[length:]  # the first tokens have no context of this length
        _, grams = np.unique(known * (tokens.max() + 1) + tokens[length:], return_inverse=True)
        seen = _count_earlier(known)
        found[length:, length] = np.divide(_count_earlier(grams), seen, out=np.full(len(seen), np.nan), where=seen > 0)
        contexts = np.concatenate([np.zeros(length + 1, np.int64), grams[:-1]])
    return found[1:]


def _count_earlier(items: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many equal ones stand before each item."""
    order = np.argsort(items, kind="stable")
    is_first = np.diff(items[order], prepend=-1) != 0
    places = np.arange(len(items))
    counts = np.empty(len(items), np.int64)
    counts[order] = places - np.maximum.accumulate(np.where(is_first, places, 0))
    return counts


class FollowerCounts:
    """How often each token followed each context of up to `order` − 1 tokens in a text.

    Args:
        order: the longest n-gram's n, at least 1.
    """

    def __init__(self, order: int) -> None:
        self.order = order
        self.counts: dict[tuple[int, ...], dict[int, int]] = {}
        """Followers of each context."""
        self.totals: dict[tuple[int, ...], int] = {}
        """Their sum."""
        self.recent: tuple[int, ...] = ()
        """The last order − 1 tokens."""

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
        """The last 0, 1, … order − 1 tokens, as far as there are so many."""
        return (self.recent[len(self.recent) - n :] for n in range(len(self.recent) + 1))

    def score(self, target: int) -> list[float]:
        """The target's probability by each order whose context has been seen."""
        found: list[float] = []
        for context in self.contexts():
            total = self.totals.get(context)
            if total is None:  # then no longer context has been seen either
                break
            found.append(self.counts[context].get(target, 0) / total)
        return found

    def followers(self) -> list[tuple[Tensor, Tensor]]:
        """Tokens and their probabilities by each order whose context has been seen."""
        found: list[tuple[Tensor, Tensor]] = []
        for context in self.contexts():
            counts = self.counts.get(context)
            if counts is None:
                break
            shares = torch.tensor(list(counts.values()), dtype=torch.float64) / self.totals[context]
            found.append((torch.tensor(list(counts)), shares))
        return found


# Both


class TextCache:
    """The cache of one text.

    Args:
        config: what is cached, and how it is mixed.
    """

    def __init__(self, config: CacheConfig) -> None:
        self.config = config
        self.states: Tensor | None = None
        """The states of the last N tokens, [n, D]; the follower of the last one is not known yet."""
        self.tokens: Tensor | None = None
        """Those tokens, [n]."""
        self.counts = FollowerCounts(config.ngram_order) if config.ngram_order else None

    @torch.no_grad()
    def add(self, states: Tensor, tokens: Tensor) -> None:
        """Remember the text's next tokens [T] and their states [T, D]."""
        num_states = self.config.num_states
        if num_states:
            states, tokens_here = self._join(states, tokens)
            self.states, self.tokens = states[-num_states:].clone(), tokens_here[-num_states:].clone()
        if self.counts is not None:
            for token in tokens.tolist():
                self.counts.read(token)

    @torch.no_grad()
    def score(self, states: Tensor, tokens: Tensor, targets: Tensor) -> Probabilities:
        """The components' probabilities of the token after each of the text's next tokens, which are not kept.

        Args:
            states: [T, D].
            tokens: [T].
            targets: [T].

        Returns:
            [T, 5], in the order of `COMPONENTS`; NaN where one is off or knows nothing, and for the model.
        """
        found = np.full((len(tokens), len(COMPONENTS)), np.nan)
        if self.config.num_states:
            joined, read = self._join(states, tokens)
            found[:, 1:2] = score_states(joined, read, targets, self.config.num_states, [self.config.theta])
        for place in self._scan(tokens):
            scores = self.counts.score(int(targets[place])) if self.counts else []
            found[place, 2 : 2 + len(scores)] = scores
        return found

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
        if self.config.num_states:
            joined, read = self._join(states, tokens)
            for place in range(len(joined) - len(probabilities), len(joined)):
                if place:
                    found, first = compare_states(joined, place, place + 1, self.config.num_states)
                    shares = (found[0].double() * self.config.theta).softmax(-1)
                    parts[place - len(joined)][1] = read[first + 1 : place + 1], shares
        for place in self._scan(tokens):
            if self.counts and place >= skipped:
                parts[place - skipped] |= dict(enumerate(self.counts.followers(), start=2))
        mixed = probabilities.clone()
        for row, found in zip(mixed, parts, strict=True):
            weights = self.config.weights[sum(component > 1 for component in found)]
            total = weights[0] + sum(weights[component] for component in found)
            row *= weights[0] / total
            for component, (followers, shares) in found.items():
                row.index_add_(0, followers.to(row.device), shares.to(row) * (weights[component] / total))
        return mixed

    def _scan(self, tokens: Tensor) -> Iterator[int]:
        """Count the next tokens one by one, each before its place is yielded; the counts are as before in the end."""
        if self.counts is None:
            return
        befores: list[tuple[int, ...]] = []
        ids = tokens.tolist()
        for place, token in enumerate(ids):
            befores.append(self.counts.recent)
            self.counts.read(token)
            yield place
        for token, recent in zip(reversed(ids), reversed(befores), strict=True):
            self.counts.unread(token, recent)

    def _join(self, states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        states = prepare_states(states, self.config.similarity)
        if self.states is None or self.tokens is None:
            return states, tokens
        return torch.cat([self.states, states]), torch.cat([self.tokens, tokens])


def mix(probabilities: Probabilities, weights: Sequence[Sequence[float]] | Probabilities) -> Probabilities:
    """The mixture's probability of each target, [T].

    Args:
        probabilities: of `TextCache.score` with the model's in column 0, [T, 5]; NaN: left out.
        weights: λ by the longest context that is known, [4, 5].
    """
    is_known = ~np.isnan(probabilities)
    chosen = np.asarray(weights)[is_known[:, 2:].sum(1)] * is_known
    return (chosen * np.where(is_known, probabilities, 0)).sum(1) / chosen.sum(1)


def tune_weights(probabilities: Probabilities, start: Sequence[Sequence[float]]) -> Probabilities:
    """The weights that make held-out text most probable, by expectation maximisation, [4, 5].

    λ_k ← mean over the tokens of λ_k p_k / Σ_j λ_j p_j, for each longest known context by itself. The likelihood is
    concave in λ, so that the start does not matter.

    Args:
        probabilities: as for `mix`, [T, 5].
        start: the weights of contexts that no token of the text has, [4, 5].
    """
    tuned = np.array(start, dtype=np.float64)
    depths = (~np.isnan(probabilities[:, 2:])).sum(1)
    for depth in range(len(tuned)):
        rows = np.nan_to_num(probabilities[depths == depth])
        if not len(rows):
            continue
        weights = np.full(len(COMPONENTS), 1 / len(COMPONENTS))
        for _ in range(EM_STEPS):
            before = weights.copy()
            weights *= (1 / np.maximum(rows @ weights, np.finfo(np.float64).tiny)) @ rows / len(rows)
            weights[0] = max(weights[0], MIN_MODEL_WEIGHT)
            weights /= weights.sum()
            if np.abs(weights - before).max() < EM_TOLERANCE:
                break
        tuned[depth] = weights
    return tuned


def describe_cache(config: CacheConfig, hidden_size: int, vocab_size: int, element_bytes: int = 4) -> dict[str, int]:
    """How much a text's cache stores.

    Returns:
        `state_numbers` N (D + 1) and their `state_bytes`; `bytes_per_token` of the text itself, which n-grams are
        looked up in: 2 for a vocabulary of at most 65,536. The tables that find them faster can be made from it.
    """
    id_bytes = 2 if vocab_size <= 1 << 16 else 4
    return {
        "state_numbers": config.num_states * (hidden_size + 1),
        "state_bytes": config.num_states * (hidden_size * element_bytes + id_bytes),
        "bytes_per_token": id_bytes if config.ngram_order else 0,
    }
