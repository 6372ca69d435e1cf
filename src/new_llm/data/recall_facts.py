"""Facts to recall: sentences to hide in a text and ask for later, and training samples with planted facts.

The parts "train" and "eval" have disjoint names, values and keys, so that a model can be trained to recall one part and
measured on the other. The pass key task is that of Landmark Attention, arXiv:2305.16300.

A sample with a planted fact contains a sentence and, further on, the same sentence again or the same fact stated
backward. The end of the second sentence is predictable only from the first, so predicting it trains the memory. A
changed fact is stated with one value, then with another, and then asked for; the newest value is the right answer. A
reworded fact is stated in other words than it is asked for, so no lookup of the question's words finds the answer.
"""

import functools
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from new_llm.config import DataConfig, UserError
from new_llm.config.train import RecallTask
from new_llm.data.reversal_pairs import ReversalPair, make_pair
from new_llm.data.tokenizer import count_ids, encode_continuation, encode_text

RecallPart = Literal["train", "eval"]
"""Which of the two disjoint sets of names, values and keys to draw from."""

FACTS_FILE = "recall_facts.json"
KEY_RANGE = (10_000, 100_000)
NUM_RELATIONS = 8  # in FACTS_FILE
EVAL_KEYS = 5  # one key in EVAL_KEYS belongs to "eval"


@dataclass(frozen=True)
class Needle:
    """A statement to hide in a text, and the question asked at the end: `prompt`, a sentence up to the answer.

    The statement begins with exactly `opening + answer`, where `opening` is the prompt unless the fact is reworded.
    Neither ends with a space; an answer begins with one and ends with the full stop, so that a byte-level BPE tokenizes
    the whole like its two parts.
    """

    statement: str
    opening: str
    prompt: str
    candidates: tuple[str, ...]
    """The right answer, then wrong ones drawn from the same set; for a changed fact the second is the old value."""
    replaced: str = ""
    """For a changed fact, the earlier statement with the old value."""
    name: str = ""
    """The person a fact is about."""
    backward: str = ""
    """The backward question, which asks for the name, with `{value}` as placeholder; empty for a pass key."""


def draw_needle(
    task: RecallTask,
    part: RecallPart,
    num_candidates: int,
    generator: np.random.Generator,
    *,
    name: str | None = None,
    among: Sequence[int] = range(NUM_RELATIONS),
) -> Needle:
    """Draw a sentence to hide, with its question and candidate answers.

    `num_candidates` is at most the number of a relation's values, and at least two for a changed fact. `name` is the
    person the fact is about (None: draw one of the part's names), and `among` are the relations to draw from, by index.
    """
    if task == "passkey":
        keys = dict[int, None]()  # a dict keeps the order
        while len(keys) < num_candidates:
            key = int(generator.integers(*KEY_RANGE))
            if is_key_of(key, part):
                keys[key] = None
        return _make_needle("The pass key is", map(str, keys), " Remember it.")
    names, relations = _read_facts(part)
    relation = relations[among[int(generator.integers(len(among)))]]
    if name is None:
        name = " ".join(several[generator.integers(len(several))] for several in names.values())
    chosen = [relation[part][i] for i in generator.choice(len(relation[part]), num_candidates, replace=False)]
    opening = relation["reworded" if task == "reworded" else "prompt"].format(name=name)
    needle = replace(_make_needle(opening, chosen), prompt=relation["prompt"].format(name=name))
    replaced = needle.prompt + needle.candidates[1] if task == "changed" else ""
    return replace(needle, replaced=replaced, name=name, backward=relation["backward"])


def draw_pairs_of_facts(
    part: RecallPart, num_texts: int, num_facts: int, seed: int, *, one_relation: bool
) -> list[ReversalPair]:
    """Draw facts in both directions: `num_facts` for each of `num_texts` texts, all of one relation or all different.

    Each pair's `relation` is its text's number, so that the answers of one text compete. All names are distinct, and so
    are the values within a text. As in planted samples, sentences begin with a space.
    """
    generator = np.random.default_rng([seed, PAIRS_STREAM])
    names, relations = _read_facts(part)
    people = [f"{first} {last}" for first in names["first_names"] for last in names["surnames"]]
    chosen = iter(generator.permutation(people).tolist())
    pairs: list[ReversalPair] = []
    for text in range(num_texts):
        kinds = generator.choice(len(relations), 1 if one_relation else num_facts, replace=False).tolist()
        values = [generator.choice(relations[kind][part], num_facts, replace=False).tolist() for kind in kinds]
        for number in range(num_facts):
            kind = number % len(kinds)
            relation = relations[kinds[kind]]
            row = {
                "relation": f"text {text}",
                "kind": "invented",
                "subject": next(chosen),
                "object": values[kind][number],
                "forward_template": f" {relation['prompt'].format(name='{subject}')} {{object}}.",
                "backward_template": f" {relation['backward'].format(value='{object}')} {{subject}}.",
            }
            pairs.append(make_pair(row, FACTS_FILE))
    return pairs


@functools.cache
def list_eval_words() -> frozenset[str]:
    """Return all names and values (but not pass keys) that the recall measure uses."""
    names, relations = _read_facts("eval")
    return frozenset(itertools.chain(*names.values(), *(relation["eval"] for relation in relations)))


def is_key_of(key: int, part: RecallPart) -> bool:
    """Return whether a pass key belongs to this part; decided by a hash, so that no pattern of digits gives it away."""
    digest = hashlib.sha256(f"pass key {key}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") % EVAL_KEYS == 0) == (part == "eval")


def _make_needle(opening: str, answers: Iterable[str], end: str = "") -> Needle:
    candidates = tuple(f" {answer}." for answer in answers)
    return Needle(f"{opening}{candidates[0]}{end}", opening, opening, candidates)


@functools.cache
def _read_facts(part: RecallPart) -> tuple[dict[str, list[str]], list[dict[str, Any]]]:
    """Return the part's names, and all relations."""
    facts = json.loads(resources.files("new_llm.data").joinpath(FACTS_FILE).read_text(encoding="utf-8"))
    return facts[part], facts["relations"]


# Planting


TEXT, STATEMENT, ANSWER = range(3)  # kinds of tokens in a sample with planted facts
TOKENS_PER_RATE = 1000  # planted_facts is a rate per this many tokens
NAMES = 2  # a made-up person has a first name and a surname
TEXT_WORDS = 0.5  # share of the made-up values that are words of the sample's own text
PAIRS_STREAM = 2**32 - 3  # independent random streams for pairs
PLANT_STREAM = 2**32 - 2  # and for planted facts
MAX_CONTINUATIONS = 6  # the most pieces after a word's first one
NAME_PIECES = (1, 4)  # the fewest and most pieces after a name's first letter
CAPITALS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_BEGINS_WORD = re.compile(r" [A-Za-z]?[a-z]*")  # a lone space precedes letters that have no entry with a space
_CONTINUES_WORD = re.compile(r"[A-Za-z][a-z]*")
_SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]*$")


class SentenceBorders:
    """Finds borders between sentences in a sequence of tokens.

    A border lies between a token whose text ends with a full stop, exclamation or question mark (possibly followed by
    quotes or brackets) and one whose text begins with white space. The full stop of an abbreviation counts, too.
    `can_stand` is whether the vocabulary allows any border at all.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        texts = decode_entries(tokenizer)
        self._ends_sentence = np.array([bool(_SENTENCE_END.search(text)) for text in texts])
        self._begins_word = np.array([text[:1].isspace() for text in texts])
        self.can_stand = bool(self._ends_sentence.any() and self._begins_word.any())

    def find_sentences(self, tokens: NDArray[np.integer]) -> NDArray[np.int64]:
        """Return the indices of tokens that begin a sentence, sorted, excluding 0 and the end."""
        begins = self._begins_word[tokens[1:]]
        return np.flatnonzero(self._ends_sentence[tokens[:-1]] & begins) + 1

    def find_words(self, tokens: NDArray[np.integer]) -> NDArray[np.int64]:
        """Return the indices of tokens that begin a word, sorted, excluding 0 and the end."""
        return np.flatnonzero(self._begins_word[tokens[1:]]) + 1


def decode_entries(tokenizer: Tokenizer) -> list[str]:
    """Return for each id of a tokenizer the text that it adds after another token.

    Decoded alone, a token would lose its leading space with Llama's decoder, and lack one with BERT's.
    """
    decode = functools.partial(tokenizer.decode, skip_special_tokens=False)
    before = encode_text(tokenizer, "a")[-1:].tolist()
    told = decode(before)
    both = [decode([*before, token]) for token in range(count_ids(tokenizer))]
    return [text.removeprefix(told) if text.startswith(told) else decode([token]) for token, text in enumerate(both)]


def choose_place(
    tokens: NDArray[np.integer], length: int, depth: float, segment_length: int, borders: SentenceBorders
) -> int:
    """Choose where in a text, [N], to insert a sentence of `length` tokens: before tokens[index], 0 ≤ index ≤ N.

    The target is depth · N. The result is the nearest sentence border, at most half a segment away, at which the
    inserted sentence spans as few segments as its length allows (usually one). If there is none, it is the nearest such
    word border within half a segment; failing that, the nearest such index. tokens[0] must begin a segment and a
    sentence.
    """
    wanted, reach = depth * len(tokens), segment_length / 2
    least = -(-length // segment_length)
    for places, limit in (
        (np.append(0, borders.find_sentences(tokens)), reach),
        (np.append(0, borders.find_words(tokens)), reach),
        (np.arange(len(tokens) + 1), np.inf),
    ):
        away = np.abs(places - wanted)
        num_segments = (places + length - 1) // segment_length - places // segment_length + 1
        fits = (num_segments == least) & (away <= limit)
        if fits.any():
            return int(places[fits][away[fits].argmin()])
    return round(wanted)


class WordPieces:
    """Draws names and words that the recall measure never uses, made up of a tokenizer's entries or taken from a text.

    Raises:
        UserError: no entry of the tokenizer begins a word, or none continues one.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._texts = tokenizer, decode_entries(tokenizer)
        self._is_first = np.array([bool(_BEGINS_WORD.fullmatch(text)) for text in self._texts])
        self._is_next = np.array([bool(_CONTINUES_WORD.fullmatch(text)) for text in self._texts])
        self._first = np.flatnonzero(self._is_first & [text != " " for text in self._texts])
        self._next = np.flatnonzero(self._is_next & [text.islower() for text in self._texts])
        if not len(self._first) or not len(self._next):
            raise UserError(
                "data.planted_made_up: the tokenizer has no entry that begins a word, or none that continues one; "
                "set it to 0"
            )

    def draw_person(self, generator: np.random.Generator) -> str:
        """Make up a first name and a surname, each a capital letter followed by some pieces."""
        names: list[str] = []
        low, high = NAME_PIECES
        while len(names) < NAMES:
            pieces = generator.choice(self._next, generator.integers(low, high + 1))
            name = str(generator.choice(list(CAPITALS))) + "".join(self._texts[piece] for piece in pieces)
            if name not in list_eval_words():
                names.append(name)
        return " ".join(names)

    def draw_word(self, text: NDArray[np.int64], generator: np.random.Generator) -> NDArray[np.int64]:
        """Return the tokens, [N], of a made-up word or of a word of the text, with equal probability."""
        while True:
            word = self._find_word(text, generator) if generator.random() < TEXT_WORDS else None
            if word is None:
                rest = generator.choice(self._next, generator.integers(MAX_CONTINUATIONS + 1))
                word = np.append(generator.choice(self._first), rest)
            if self._tokenizer.decode(word.tolist()).strip() not in list_eval_words():
                return word

    def _find_word(self, tokens: NDArray[np.int64], generator: np.random.Generator) -> NDArray[np.int64] | None:
        """Draw a whole word of the text, uniformly over distinct first tokens; None if that draw finds none."""
        begins = np.flatnonzero(self._is_first[tokens[:-1]])
        if not len(begins):
            return None
        begin = generator.choice(begins[tokens[begins] == generator.choice(np.unique(tokens[begins]))])
        rest = tokens[begin + 1 : begin + 2 + MAX_CONTINUATIONS]
        is_other = ~self._is_next[rest]
        if not is_other.any():
            return None
        word = tokens[begin : begin + 1 + int(is_other.argmax())]
        return None if self._texts[word[-1]] == " " else word.copy()


class SamplePlanter:
    """Plants `planted_facts` facts per thousand tokens on average, each stated twice (a changed one three times).

    The first statement's place is uniform over the sample. The distance to each following statement, in tokens of the
    original sample, is log-uniform between the two values of `planted_distance`. Every place is moved to the nearest
    sentence border. Facts whose last place lies beyond the end of the sample, or whose question has been used before,
    are dropped.

    A share `planted_backward` of the facts is stated backward the last time: the value, then the name. A share
    `planted_made_up` of the people has a made-up name, and the same share of the values (except pass keys) is a
    made-up word or a word of the sample's own text.
    """

    def __init__(self, tokenizer: Tokenizer, config: DataConfig, seed: int) -> None:
        self._decode, self._encode = tokenizer.decode, functools.partial(encode_continuation, tokenizer)
        self._config, self._seed = config, seed
        self._stop = self._encode(".")
        self._borders = SentenceBorders(tokenizer)
        if not self._borders.can_stand:
            raise UserError(
                "data.planted_facts: the tokenizer has no entry that ends a sentence, or none that begins with white "
                "space, so facts can't be planted"
            )
        self._pieces = WordPieces(tokenizer) if config.planted_made_up else None

    def plant(self, tokens: NDArray[np.int64], epoch: int, begin: int) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Plant facts into a sample, [N]. The seed, the epoch and the sample's offset `begin` determine all choices.

        Returns the sample with its facts inserted, cut to N tokens; and the kind of each token, [N]: `TEXT`, `ANSWER`
        (after a fact's last question, predictable from an earlier statement), or `STATEMENT` (other planted tokens).
        """
        config, length = self._config, len(tokens)
        generator = np.random.default_rng([self._seed, PLANT_STREAM, epoch, begin])
        kinds = np.full(length, TEXT, np.uint8)
        borders = self._borders.find_sentences(tokens) if length > 1 else np.zeros(0, np.int64)
        if not len(borders):
            return tokens, kinds
        low, high = (math.log(distance) for distance in config.planted_distance)
        among: Sequence[int] = range(NUM_RELATIONS)
        if config.planted_relations < NUM_RELATIONS:
            among = generator.choice(NUM_RELATIONS, config.planted_relations, replace=False).tolist()
        asked = set[str]()
        places, planted, marks = list[NDArray[np.int64]](), list[NDArray[np.int64]](), list[NDArray[np.uint8]]()
        for _ in range(generator.poisson(config.planted_facts * length / TOKENS_PER_RATE)):
            questions, statements, answer_begin = self._draw(tokens, among, generator)
            wanted = [int(generator.integers(length))]
            for _ in statements[1:]:
                wanted.append(wanted[-1] + round(math.exp(generator.uniform(low, high))))
            if wanted[-1] >= length or asked & questions:
                continue
            asked |= questions
            for at, statement in zip(wanted, statements, strict=True):
                places.append(np.full(len(statement), borders[np.abs(borders - at).argmin()]))
                planted.append(statement)
                marks.append(np.full(len(statement), STATEMENT, np.uint8))
            marks[-1][answer_begin:] = ANSWER
        if not planted:
            return tokens, kinds
        before = np.concatenate(places)  # np.insert keeps the order of insertions at the same place
        return (
            np.insert(tokens, before, np.concatenate(planted))[:length],
            np.insert(kinds, before, np.concatenate(marks))[:length],
        )

    def _draw(
        self, text: NDArray[np.int64], among: Sequence[int], generator: np.random.Generator
    ) -> tuple[set[str], list[NDArray[np.int64]], int]:
        """Draw a fact: its questions, the tokens of its statements, and where the answer begins in the last statement.

        The last statement serves as the question: it states the newest value in the words of the prompt, or the fact
        backward. If facts may be stated backward, the backward question is among the questions.
        """
        config, pieces = self._config, self._pieces
        task = config.planted_tasks[generator.integers(len(config.planted_tasks))]
        name = None
        if task != "passkey" and pieces is not None and generator.random() < config.planted_made_up:
            name = pieces.draw_person(generator)
        needle = draw_needle(task, "train", 1 + (task == "changed"), generator, name=name, among=among)
        opening, question = (self._encode(f" {prompt}") for prompt in (needle.opening, needle.prompt))
        stop = self._stop
        told = [one for one in (needle.replaced, needle.statement) if one]
        if task != "passkey" and pieces is not None and generator.random() < config.planted_made_up:
            statements = [np.concatenate([opening, pieces.draw_word(text, generator), stop]) for _ in told]
        else:
            statements = [self._encode(f" {one}") for one in told]
        newest, questions = statements[-1], {needle.prompt}
        if needle.backward and config.planted_backward:
            before, after = needle.backward.split(" {value}")
            value = newest[len(opening) : -len(stop)]
            questions.add(needle.backward.format(value=self._decode(value.tolist()).strip()))
            if generator.random() < config.planted_backward:
                prompt = np.concatenate([self._encode(f" {before}"), value, self._encode(after)])
                backward = np.concatenate([prompt, self._encode(f" {needle.name}"), stop])
                return questions, [*statements, backward], len(prompt)
        if needle.opening != needle.prompt:
            newest = np.concatenate([question, newest[len(opening) :]])
        return questions, [*statements, newest], len(question)
