"""Facts to recall: sentences to hide in a text and to ask for later, and training samples in which they are planted.

Names, values and keys of the parts "train" and "eval" are disjoint, so that a model may be trained to recall the ones
and measured on the others. The pass key task is that of Landmark Attention, arXiv:2305.16300.

A planted sample holds a sentence, and further on the same sentence again, or the same fact stated backward.
What the second one ends with can be known from the first alone, so that predicting it trains the memory. A changed fact
is stated with one value, then with another, then asked for: the newest statement is right.
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
from new_llm.data.reversal_pairs import ReversalPair, make_pair
from new_llm.data.tokenizer import count_ids, encode_continuation, encode_text

RecallTask = Literal["passkey", "facts", "changed"]
"""passkey: a number; facts: one sentence about an invented person; changed: one that replaces an earlier one."""
RecallPart = Literal["train", "eval"]
"""Which of two disjoint sets of names, values and keys is drawn from."""

FACTS_FILE = "recall_facts.json"
KEY_RANGE = (10_000, 100_000)
NUM_RELATIONS = 8  # of the file
EVAL_KEYS = 5  # one key in this many is for evaluation


@dataclass(frozen=True)
class Needle:
    """A statement to hide in a text, and the question for it in the end: the prompt, the statement up to the answer.

    The statement begins with `prompt + answer`, exactly. The prompt ends without a space; an answer begins with one
    and ends with the full stop, so a byte-level BPE cuts the sentence as it cuts the prompt and the answer apart.
    """

    statement: str
    prompt: str
    candidates: tuple[str, ...]
    """The right answer first, then wrong ones drawn from where it was drawn; of a changed fact the old value first."""
    replaced: str = ""
    """The earlier statement that this one replaces, with the old value; empty: there is none."""
    name: str = ""
    """Whom a fact is about."""
    backward: str = ""
    """The question for the name, with `{value}` where the value stands; empty: there is none."""


def draw_needle(
    task: RecallTask,
    part: RecallPart,
    num_candidates: int,
    generator: np.random.Generator,
    *,
    name: str | None = None,
    among: Sequence[int] = range(NUM_RELATIONS),
) -> Needle:
    """Draw a sentence to hide, with its question and the answers to choose from, the right one among them.

    `name` is whom a fact is about; None: one of the part's names. `among` are the relations that it may be of. There
    are as many `num_candidates` at most as a relation has values, and of a changed fact two at least.
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
    needle = _make_needle(relation["prompt"].format(name=name), chosen)
    replaced = needle.prompt + needle.candidates[1] if task == "changed" else ""
    return replace(needle, replaced=replaced, name=name, backward=relation["backward"])


def draw_pairs_of_facts(
    part: RecallPart, num_texts: int, num_facts: int, seed: int, *, one_relation: bool
) -> list[ReversalPair]:
    """Facts in both directions: `num_facts` for each of `num_texts` texts, of one relation or each of another.

    Each pair's `relation` is its text, so that the answers of one text compete; no two facts share a name, nor two of a
    text a value. As in planted samples a sentence begins with a space.
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
    """All names that recall is measured with, and all values in words, of every relation."""
    names, relations = _read_facts("eval")
    return frozenset(itertools.chain(*names.values(), *(relation["eval"] for relation in relations)))


def is_key_of(key: int, part: RecallPart) -> bool:
    """Whether a pass key belongs to this part: by a hash, so that the number itself does not show it."""
    digest = hashlib.sha256(f"pass key {key}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") % EVAL_KEYS == 0) == (part == "eval")


def _make_needle(prompt: str, answers: Iterable[str], end: str = "") -> Needle:
    candidates = tuple(f" {answer}." for answer in answers)
    return Needle(f"{prompt}{candidates[0]}{end}", prompt, candidates)


@functools.cache
def _read_facts(part: RecallPart) -> tuple[dict[str, list[str]], list[dict[str, Any]]]:
    """The part's names, and all relations."""
    facts = json.loads(resources.files("new_llm.data").joinpath(FACTS_FILE).read_text(encoding="utf-8"))
    return facts[part], facts["relations"]


# Planting


TOKENS_PER_RATE = 1000  # planted_facts is a number per this many tokens
NAMES = 2  # a made-up person has a first name and a surname
TEXT_WORDS = 0.5  # share of the values from no list that are words of the sample's own text
PAIRS_STREAM = 2**32 - 3  # keeps the choice of pairs apart from that
PLANT_STREAM = 2**32 - 2  # keeps the choice of facts apart from a sample's place in the order
MAX_CONTINUATIONS = 6  # pieces after a word's first one, at most
NAME_PIECES = (1, 4)  # pieces after a name's first letter, at least and at most
CAPITALS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_BEGINS_WORD = re.compile(r" [A-Za-z]?[a-z]*")  # a space alone stands before letters that have no entry with one
_CONTINUES_WORD = re.compile(r"[A-Za-z][a-z]*")
_SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]*$")


class SentenceBorders:
    """Where a sentence may be put into a sequence of tokens.

    A border stands between a token whose text ends with a full stop, an exclamation or a question mark (quotes and
    brackets may follow) and one whose text begins with white space. An abbreviation's full stop counts, too.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        texts = decode_entries(tokenizer)
        self._ends_sentence = np.array([bool(_SENTENCE_END.search(text)) for text in texts])
        self._begins_word = np.array([text[:1].isspace() for text in texts])
        self.can_stand = bool(self._ends_sentence.any() and self._begins_word.any())

    def find_sentences(self, tokens: NDArray[np.integer]) -> NDArray[np.int64]:
        """Indices before which a sentence may stand, rising, without 0 and the end."""
        begins = self._begins_word[tokens[1:]]
        return np.flatnonzero(self._ends_sentence[tokens[:-1]] & begins) + 1

    def find_words(self, tokens: NDArray[np.integer]) -> NDArray[np.int64]:
        """Indices at which a word begins, rising, without 0 and the end."""
        return np.flatnonzero(self._begins_word[tokens[1:]]) + 1


def decode_entries(tokenizer: Tokenizer) -> list[str]:
    """The text that every entry of a tokenizer adds after another one, by its token.

    Decoded alone, an entry would lose its leading space with a decoder like Llama's, and would gain none with BERT's.
    """
    decode = functools.partial(tokenizer.decode, skip_special_tokens=False)
    before = encode_text(tokenizer, "a")[-1:].tolist()
    told = decode(before)
    both = [decode([*before, token]) for token in range(count_ids(tokenizer))]
    return [text.removeprefix(told) if text.startswith(told) else decode([token]) for token, text in enumerate(both)]


def choose_place(
    tokens: NDArray[np.integer], length: int, depth: float, segment_length: int, borders: SentenceBorders
) -> int:
    """Where in a text, [N], to put a sentence, so that no segment's end cuts it in two: before tokens[index], 0 to N.

    The place at the depth is depth · N. Taken is the nearest border of sentences, at most half a segment away, that
    keeps the sentence inside one segment (inside as few as its length allows); without one the nearest such border of
    words, without that the nearest such place. The text's first token begins a segment and a sentence.
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
    """Draws names and words that recall is not measured with: made up of a tokenizer's pieces, or a text's.

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
                "data.planted_made_up: the tokenizer has no entry that begins a word, or none that continues one: "
                "set it to 0"
            )

    def draw_person(self, generator: np.random.Generator) -> str:
        """A made-up first name and surname, each a capital letter and some pieces."""
        names: list[str] = []
        low, high = NAME_PIECES
        while len(names) < NAMES:
            pieces = generator.choice(self._next, generator.integers(low, high + 1))
            name = str(generator.choice(list(CAPITALS))) + "".join(self._texts[piece] for piece in pieces)
            if name not in list_eval_words():
                names.append(name)
        return " ".join(names)

    def draw_word(self, text: NDArray[np.int64], generator: np.random.Generator) -> NDArray[np.int64]:
        """The tokens of a made-up word or of one of the text, [N], as often the one as the other."""
        while True:
            word = self._find_word(text, generator) if generator.random() < TEXT_WORDS else None
            if word is None:
                rest = generator.choice(self._next, generator.integers(MAX_CONTINUATIONS + 1))
                word = np.append(generator.choice(self._first), rest)
            if self._tokenizer.decode(word.tolist()).strip() not in list_eval_words():
                return word

    def _find_word(self, tokens: NDArray[np.int64], generator: np.random.Generator) -> NDArray[np.int64] | None:
        """A word of the text, rare ones as often as frequent ones; None: it has none that is whole."""
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
    """Puts `planted_facts` facts into every thousand tokens of a sample, each stated twice, a changed one three times.

    The first place is drawn evenly over the sample; the way to each next one, in tokens of the sample's text, so that
    its logarithm is even between the two `planted_distance`. All are moved to the nearest border of sentences. A fact
    whose last place lies beyond the sample's end is left out, and so is one whose question has been asked before. The
    share `planted_backward` of the facts is told backward the last time: the value, then the name. The share
    `planted_made_up` of the persons has a name that is made up of the tokenizer's own pieces, and that share of the
    values in words is from no list: made up, too, or a word of the sample's own text.
    """

    def __init__(self, tokenizer: Tokenizer, config: DataConfig, seed: int) -> None:
        self._decode, self._encode = tokenizer.decode, functools.partial(encode_continuation, tokenizer)
        self._config, self._seed = config, seed
        self._stop = self._encode(".")
        self._borders = SentenceBorders(tokenizer)
        if not self._borders.can_stand:
            raise UserError(
                "data.planted_facts: the tokenizer has no entry that ends a sentence, or none that begins with white "
                "space: facts have no place"
            )
        self._pieces = WordPieces(tokenizer) if config.planted_made_up else None

    def plant(self, tokens: NDArray[np.int64], epoch: int, begin: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """One sample, [N], with its facts, which displace as many tokens at its end; and which tokens they give away.

        These are the tokens after a fact's last question, which can be known from an earlier statement. The epoch,
        where in its split the sample begins, and the seed decide all choices.
        """
        config, length = self._config, len(tokens)
        generator = np.random.default_rng([self._seed, PLANT_STREAM, epoch, begin])
        is_answer = np.zeros(length, np.bool_)
        borders = self._borders.find_sentences(tokens) if length > 1 else np.zeros(0, np.int64)
        if not len(borders):
            return tokens, is_answer
        low, high = (math.log(distance) for distance in config.planted_distance)
        among: Sequence[int] = range(NUM_RELATIONS)
        if config.planted_relations < NUM_RELATIONS:
            among = generator.choice(NUM_RELATIONS, config.planted_relations, replace=False).tolist()
        asked = set[str]()
        places, planted, marks = list[NDArray[np.int64]](), list[NDArray[np.int64]](), list[NDArray[np.bool_]]()
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
                marks.append(np.zeros(len(statement), np.bool_))
            marks[-1][answer_begin:] = True
        if not planted:
            return tokens, is_answer
        before = np.concatenate(places)  # np.insert keeps the order of what goes to one place
        return (
            np.insert(tokens, before, np.concatenate(planted))[:length],
            np.insert(is_answer, before, np.concatenate(marks))[:length],
        )

    def _draw(
        self, text: NDArray[np.int64], among: Sequence[int], generator: np.random.Generator
    ) -> tuple[set[str], list[NDArray[np.int64]], int]:
        """A fact's questions, the tokens of its statements, and where in the last of them the answer begins.

        The last one asks: it is the newest statement again, or the same fact told backward. Where facts may be told so,
        there is a second question, for the name.
        """
        config, pieces = self._config, self._pieces
        task = config.planted_tasks[generator.integers(len(config.planted_tasks))]
        name = None
        if task != "passkey" and pieces is not None and generator.random() < config.planted_made_up:
            name = pieces.draw_person(generator)
        needle = draw_needle(task, "train", 1 + (task == "changed"), generator, name=name, among=among)
        question, stop = self._encode(f" {needle.prompt}"), self._stop
        told = [one for one in (needle.replaced, needle.statement) if one]
        if task != "passkey" and pieces is not None and generator.random() < config.planted_made_up:
            statements = [np.concatenate([question, pieces.draw_word(text, generator), stop]) for _ in told]
        else:
            statements = [self._encode(f" {one}") for one in told]
        newest, questions = statements[-1], {needle.prompt}
        if needle.backward and config.planted_backward:
            before, after = needle.backward.split(" {value}")
            value = newest[len(question) : -len(stop)]
            questions.add(needle.backward.format(value=self._decode(value.tolist()).strip()))
            if generator.random() < config.planted_backward:
                prompt = np.concatenate([self._encode(f" {before}"), value, self._encode(after)])
                backward = np.concatenate([prompt, self._encode(f" {needle.name}"), stop])
                return questions, [*statements, backward], len(prompt)
        return questions, [*statements, newest], len(question)
