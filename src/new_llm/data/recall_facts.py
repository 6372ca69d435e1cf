"""Sentences to hide in a text and to ask for later: pass keys, and facts about invented persons.

Names, values and keys of the parts "train" and "eval" are disjoint, so that a model may be trained to recall the ones
and measured on the others. The pass key task is that of Landmark Attention, arXiv:2305.16300.
"""

import functools
import hashlib
import itertools
import json
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

import numpy as np

RecallTask = Literal["passkey", "facts"]
"""passkey: a number; facts: one sentence about an invented person."""
RecallPart = Literal["train", "eval"]
"""Which of two disjoint sets of names, values and keys is drawn from."""

FACTS_FILE = "recall_facts.json"
KEY_RANGE = (10_000, 100_000)
EVAL_KEYS = 5  # one key of so many is for evaluation


@dataclass(frozen=True)
class Needle:
    """A sentence to hide, and the question for it.

    The statement begins with `prompt + answer`, exactly. The prompt ends without a space; an answer begins with one
    and ends with the full stop, so a byte-level BPE cuts the sentence as it cuts the prompt and the answer apart.
    """

    task: RecallTask
    statement: str
    """What is hidden in the text."""
    prompt: str
    """What is asked in the end: the statement up to the answer."""
    answer: str
    """The right answer."""
    candidates: tuple[str, ...]
    """The right answer first, then wrong ones drawn from where it was drawn."""


def draw_needle(
    task: RecallTask, part: RecallPart, num_candidates: int, generator: np.random.Generator, *, name: str | None = None
) -> Needle:
    """Draw a sentence to hide, with its question and the answers to choose from.

    Args:
        task: what kind of sentence.
        part: which names, values and keys to draw from.
        num_candidates: answers to choose from, the right one among them.
        generator: draws.
        name: whom a fact is about; None: one of the part's names.

    Raises:
        ValueError: more candidates than a relation of this part has values, or fewer than one.
    """
    if task == "passkey":
        keys = _draw_keys(part, num_candidates, generator)
        return _make(task, "The pass key is", keys, " Remember it.")
    names, relations = _read_facts(part)
    relation = relations[generator.integers(len(relations))]
    values = relation[part]
    if not 1 <= num_candidates <= len(values):
        raise ValueError(f"{num_candidates} candidates: a relation has {len(values)} values, and 1 is the least")
    if name is None:
        name = f"{_choose(names['first_names'], generator)} {_choose(names['surnames'], generator)}"
    chosen = [values[i] for i in generator.choice(len(values), num_candidates, replace=False)]
    return _make(task, relation["prompt"].format(name=name), chosen, "")


@functools.cache
def list_words(part: RecallPart) -> frozenset[str]:
    """All names of a part, and all its values in words, of every relation."""
    names, relations = _read_facts(part)
    return frozenset(itertools.chain(*names.values(), *(relation[part] for relation in relations)))


def is_key_of(key: int, part: RecallPart) -> bool:
    """Whether a pass key belongs to this part: by a hash, so that nothing in the number itself says so."""
    digest = hashlib.sha256(f"pass key {key}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") % EVAL_KEYS == 0) == (part == "eval")


def _make(task: RecallTask, prompt: str, answers: list[str], end: str) -> Needle:
    candidates = tuple(f" {answer}." for answer in answers)
    return Needle(task, f"{prompt}{candidates[0]}{end}", prompt, candidates[0], candidates)


def _draw_keys(part: RecallPart, count: int, generator: np.random.Generator) -> list[str]:
    keys: dict[int, None] = {}  # a dict keeps the order
    while len(keys) < count:
        key = int(generator.integers(*KEY_RANGE))
        if is_key_of(key, part):
            keys[key] = None
    return [str(key) for key in keys]


def _choose(values: list[str], generator: np.random.Generator) -> str:
    return values[generator.integers(len(values))]


@functools.cache
def _read_facts(part: RecallPart) -> tuple[dict[str, list[str]], list[dict[str, Any]]]:
    """The part's names, and all relations."""
    facts = json.loads(resources.files("new_llm.data").joinpath(FACTS_FILE).read_text(encoding="utf-8"))
    return facts[part], facts["relations"]
