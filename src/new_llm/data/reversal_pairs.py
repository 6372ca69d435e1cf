"""Facts stated in two directions, to measure the reversal curse.

A model that has read "The capital of France is Paris." often cannot complete "Paris is the capital of" (the
reversal curse, arXiv:2309.12288). The forward sentences join the training set; the backward ones are never
trained on.
"""

import json
from dataclasses import dataclass
from importlib import resources
from typing import Literal

FACTS_FILE = "reversal_pairs.json"


@dataclass(frozen=True)
class ReversalPair:
    """One fact in both directions; each direction's answer is the entity that its sentence names last.

    `forward == forward_prompt + forward_answer` and `backward == backward_prompt + backward_answer`, exactly.
    A prompt ends without a space; an answer begins with one and ends with the full stop, so a byte-level BPE
    cuts the sentence as it cuts the prompt and the answer apart. The answers of a relation are
    interchangeable: each fits every prompt of the relation and direction, and is right for one of them.
    """

    relation: str
    """Name of the relation, the same for all pairs whose answers compete."""
    subject: str
    """The entity that the forward sentence names first."""
    object: str
    """The entity that the forward sentence names last."""
    kind: Literal["real", "invented", "unstated"]
    """real: a fact that other text may state too; invented: about names made up for this list; unstated: of a file
    that doesn't tell."""
    forward: str
    """The whole forward sentence."""
    backward: str
    """The whole backward sentence."""
    forward_prompt: str
    """The forward sentence up to the object."""
    forward_answer: str
    """The object, with the space before it and the full stop."""
    backward_prompt: str
    """The backward sentence up to the subject."""
    backward_answer: str
    """The subject, with the space before it and the full stop."""


def get_reversal_pairs() -> list[ReversalPair]:
    """Read the project's own pairs: real facts in eight relations, and invented ones in two.

    Within a relation the facts are one to one, so every answer is right for a single prompt in either
    direction. All relations have the same number of facts, hence the same chance of a right guess.

    Returns:
        The pairs in the file's order, relation after relation.
    """
    text = resources.files("new_llm.data").joinpath(FACTS_FILE).read_text(encoding="utf-8")
    pairs: list[ReversalPair] = []
    for relation in json.loads(text)["relations"]:
        for subject, object_ in relation["facts"]:
            forward_prompt = relation["forward_prompt"].format(subject=subject)
            backward_prompt = relation["backward_prompt"].format(object=object_)
            forward_answer, backward_answer = f" {object_}.", f" {subject}."
            pairs.append(
                ReversalPair(
                    relation=relation["relation"],
                    subject=subject,
                    object=object_,
                    kind=relation["kind"],
                    forward=forward_prompt + forward_answer,
                    backward=backward_prompt + backward_answer,
                    forward_prompt=forward_prompt,
                    forward_answer=forward_answer,
                    backward_prompt=backward_prompt,
                    backward_answer=backward_answer,
                )
            )
    return pairs
