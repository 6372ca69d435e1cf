"""Facts stated in two directions, to measure the reversal curse: the project's own pairs, and those of a user's file.

A model that has read "The capital of France is Paris." often cannot complete "Paris is the capital of" (the
reversal curse, arXiv:2309.12288). The forward sentences join the training set; the backward ones are never
trained on.

A file is .csv, with names in its first line, or .jsonl. A row states a fact in one of two ways:

- by sentences: relation, forward_prompt, forward_answer, backward_prompt, backward_answer;
- by templates: relation, subject, object, forward_template, backward_template. Each template names {subject} and
  {object} once; the forward one names the object last, the backward one the subject. What stands before the last name
  is the prompt, the rest the answer.

Either form may have a `kind` (real or invented).
"""

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from new_llm.config import UserError
from new_llm.config.files import load_json, read_text_file
from new_llm.config.sections import preview, section
from new_llm.config.terminal import make_printable

FACTS_FILE = "reversal_pairs.json"
ALLOWED = (
    "relation, forward_prompt, forward_answer, backward_prompt, backward_answer; or relation, subject, object, "
    "forward_template, backward_template; with either, kind"
)
MAX_FILE_BYTES = 1 << 26
PAIRS_STREAM = 3  # keeps these random numbers apart from those of the splits


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
    backward: str
    forward_prompt: str
    forward_answer: str
    backward_prompt: str
    backward_answer: str


def get_reversal_pairs() -> list[ReversalPair]:
    """Read the project's own pairs, relation after relation: real facts in eight relations, and invented ones in two.

    Within a relation the facts are one to one, so every answer is right for a single prompt in either
    direction. All relations have the same number of facts, hence the same chance of a right guess.
    """
    text = resources.files("new_llm.data").joinpath(FACTS_FILE).read_text(encoding="utf-8")
    return [
        make_pair(relation | {"subject": subject, "object": object_}, FACTS_FILE)
        for relation in json.loads(text)["relations"]
        for subject, object_ in relation.pop("facts")
    ]


def read_reversal_pairs(path: Path) -> list[ReversalPair]:
    """Read the pairs of a .csv or .jsonl file in UTF-8; what is wrong with it is a `UserError` that names the line."""
    rows = {".csv": _read_csv, ".jsonl": _read_jsonl}.get(path.suffix.lower())
    if rows is None:
        raise UserError(f"{path}: pairs are read from .csv and .jsonl files")
    pairs: list[ReversalPair] = []
    lines: dict[tuple[str, str, str], int] = {}
    text = read_text_file(path, MAX_FILE_BYTES).removeprefix("\ufeff")
    for number, row in rows(path, text):
        pair = make_pair(row, f"{path}: line {number}")
        identity = (pair.relation, pair.forward, pair.backward)
        if identity in lines:
            raise UserError(f"{path}: line {number}: repeats the pair of line {lines[identity]}")
        lines[identity] = number
        pairs.append(pair)
    if not pairs:
        raise UserError(f"{path}: holds no pair; a pair's fields are {ALLOWED}")
    return pairs


def draw_pairs(pairs: Sequence[ReversalPair], per_relation: int, seed: int) -> list[ReversalPair]:
    """`per_relation` random pairs of each relation, without replacement and in their order, or all that it has.

    Another relation's pairs change nothing of what is drawn of one.
    """
    if per_relation < 1:
        raise ValueError(f"per_relation: {per_relation} is not positive")
    members: dict[str, list[int]] = {}
    for index, pair in enumerate(pairs):
        members.setdefault(pair.relation, []).append(index)
    chosen: list[int] = []
    for relation, indices in members.items():
        rng = np.random.default_rng([seed, PAIRS_STREAM, *relation.encode("utf-8")])
        chosen += rng.permutation(indices)[:per_relation].tolist()
    return [pairs[index] for index in sorted(chosen)]


def _read_csv(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    # strict: what follows a closing quote is no part of the field
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num}: not valid CSV: {error}") from None
    names = [name.strip() for name in rows[0][1]] if rows else []
    if len(set(names)) < len(names):
        raise UserError(f"{path}: line 1: names a field twice: {', '.join(names)}")
    for number, row in rows[1:]:
        if len(row) != len(names):
            raise UserError(f"{path}: line {number}: {len(row)} cells, but the first line names {len(names)}")
        yield number, {name: cell for name, cell in zip(names, row, strict=True) if cell or name != "kind"}


def _read_jsonl(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                found = load_json(line)
            except ValueError as error:
                raise UserError(f"{path}: line {number}: not valid JSON: {error}") from None
            if not isinstance(found, dict):
                raise UserError(f"{path}: line {number}: not a JSON object: {preview(found)}")
            yield number, found


def _check_text(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("blank", "is empty")
    if make_printable(text) != text:
        raise PydanticCustomError("control", "holds a control character")
    return text


Text = Annotated[str, Field(max_length=2000), AfterValidator(_check_text)]


@section
class _Sentences:
    relation: Text
    forward_prompt: Text
    forward_answer: Text
    backward_prompt: Text
    backward_answer: Text
    subject: Text | None = None
    object: Text | None = None
    kind: Literal["real", "invented"] | None = None


@section
class _Templates:
    relation: Text
    subject: Text
    object: Text
    forward_template: Text
    backward_template: Text
    kind: Literal["real", "invented"] | None = None


def make_pair(row: dict[str, Any], where: str) -> ReversalPair:
    """The pair of a row, by sentences or by templates; what is wrong with it is a `UserError` that says where it is."""
    has_templates = any(name.endswith("_template") for name in row)
    try:
        facts = (_Templates if has_templates else _Sentences)(**row)
    except UserError as error:
        raise UserError(f"{where}: {str(error).partition(': ')[2]}; a pair's fields are {ALLOWED}") from None
    if isinstance(facts, _Templates):
        forward = _fill(facts.forward_template, {"subject": facts.subject, "object": facts.object}, where)
        backward = _fill(facts.backward_template, {"object": facts.object, "subject": facts.subject}, where)
    else:
        forward = _join(facts.forward_prompt, facts.forward_answer)
        backward = _join(facts.backward_prompt, facts.backward_answer)
    return ReversalPair(
        relation=facts.relation.strip(),
        subject=(facts.subject or backward[1].rstrip(".")).strip(),
        object=(facts.object or forward[1].rstrip(".")).strip(),
        kind=facts.kind or "unstated",
        forward="".join(forward),
        backward="".join(backward),
        forward_prompt=forward[0],
        forward_answer=forward[1],
        backward_prompt=backward[0],
        backward_answer=backward[1],
    )


def _join(prompt: str, answer: str) -> tuple[str, str]:
    """Prompt and answer with the white space between them put before the answer; one space where there is none."""
    stripped, rest = prompt.rstrip(), answer.lstrip()
    space = prompt[len(stripped) :] + answer[: len(answer) - len(rest)]
    return stripped, (space or " ") + rest.rstrip()


def _fill(template: str, names: dict[str, str], where: str) -> tuple[str, str]:
    """Prompt and answer of a template, which has the names in this order."""
    pieces = re.split(r"\{(\w*)\}", template)
    if pieces[1::2] != list(names) or any(brace in "".join(pieces[0::2]) for brace in "{}"):
        wanted = " once and then ".join(f"{{{name}}}" for name in names)
        raise UserError(f"{where}: the template {preview(template)} must name {wanted} once, and no more")
    before, first, between, last, after = pieces
    prompt = before + names[first].strip() + between
    stripped = prompt.rstrip()
    if not stripped:
        raise UserError(f"{where}: the template {preview(template)} has nothing before the answer")
    return stripped, prompt[len(stripped) :] + names[last].strip() + after.rstrip()
