"""Facts stated in both directions, to measure the reversal curse: the project's own pairs, or pairs from a file.

A model that has read "The capital of France is Paris." often cannot complete "Paris is the capital of" (the
reversal curse, arXiv:2309.12288). The forward sentences are added to the training set; the backward ones are not,
unless `data.reversal_taught` asks for some.

A file is .csv with column names in its first line, or .jsonl. A row states a fact in one of two forms:

- sentences: relation, forward_prompt, forward_answer, backward_prompt, backward_answer;
- templates: relation, subject, object, forward_template, backward_template. Each template contains {subject} and
  {object} once; the forward one ends with the object, the backward one with the subject. The text before the last name
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
PAIRS_STREAM = 3  # an independent random stream for `draw_pairs`


@dataclass(frozen=True)
class ReversalPair:
    """One fact in both directions. In each, the answer is the entity that the sentence names last.

    `forward == forward_prompt + forward_answer` and `backward == backward_prompt + backward_answer`, exactly. A prompt
    does not end with a space; an answer begins with one and ends with the full stop, so that a byte-level BPE tokenizes
    the sentence like its two parts. The answers of a relation are interchangeable: each fits every prompt of the
    relation and direction, and is right for one of them.
    """

    relation: str
    """The relation's name, shared by all pairs whose answers compete."""
    subject: str
    """The entity that the forward sentence names first."""
    object: str
    """The entity that the forward sentence names last."""
    kind: Literal["real", "invented", "unstated"]
    """real: other text may state the fact, too; invented: its names were made up for this list; unstated: the file does
    not say."""
    forward: str
    backward: str
    forward_prompt: str
    forward_answer: str
    backward_prompt: str
    backward_answer: str


def get_reversal_pairs() -> list[ReversalPair]:
    """Return the project's own pairs, grouped by relation: real facts in eight relations, invented ones in two.

    Each relation is one-to-one, so that every answer is right for exactly one prompt in either direction. All relations
    have the same number of facts, and hence the same chance of a right guess.
    """
    text = resources.files("new_llm.data").joinpath(FACTS_FILE).read_text(encoding="utf-8")
    return [
        make_pair(relation | {"subject": subject, "object": object_}, FACTS_FILE)
        for relation in json.loads(text)["relations"]
        for subject, object_ in relation.pop("facts")
    ]


def read_reversal_pairs(path: Path) -> list[ReversalPair]:
    """Read the pairs of a UTF-8 .csv or .jsonl file. A fault in it raises a `UserError` that names the line."""
    rows = {".csv": _read_csv, ".jsonl": _read_jsonl}.get(path.suffix.lower())
    if rows is None:
        raise UserError(f"{path}: unknown extension; pairs are read from .csv and .jsonl files")
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
        raise UserError(f"{path}: contains no pairs; a pair's fields are {ALLOWED}")
    return pairs


def draw_pairs(pairs: Sequence[ReversalPair], per_relation: int, seed: int) -> list[ReversalPair]:
    """Draw `per_relation` pairs of each relation without replacement, or all if it has fewer; the order is kept.

    The draw from one relation does not depend on the other relations.
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
    # strict: text after a closing quote is an error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num}: not valid CSV: {error}") from None
    names = [name.strip() for name in rows[0][1]] if rows else []
    if len(set(names)) < len(names):
        raise UserError(f"{path}: line 1: duplicate column name: {', '.join(names)}")
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
        raise PydanticCustomError("control", "contains a control character")
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
    """Make a pair from a row of sentences or templates. A fault raises a `UserError` that begins with `where`."""
    has_templates = any(name.endswith("_template") for name in row)
    try:
        facts = (_Templates if has_templates else _Sentences)(**row)
    except UserError as error:
        raise UserError(f"{where}: {error}; a pair's fields are {ALLOWED}") from None
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
    """Move the white space between prompt and answer to the front of the answer; insert a space if there is none."""
    stripped, rest = prompt.rstrip(), answer.lstrip()
    space = prompt[len(stripped) :] + answer[: len(answer) - len(rest)]
    return stripped, (space or " ") + rest.rstrip()


def _fill(template: str, names: dict[str, str], where: str) -> tuple[str, str]:
    """Fill a template, which must contain the names in this order; return prompt and answer."""
    pieces = re.split(r"\{(\w*)\}", template)
    if pieces[1::2] != list(names) or any(brace in "".join(pieces[0::2]) for brace in "{}"):
        wanted = " once and then ".join(f"{{{name}}}" for name in names)
        raise UserError(f"{where}: the template {preview(template)} must name {wanted} once, and no more")
    before, first, between, last, after = pieces
    prompt = before + names[first].strip() + between
    stripped = prompt.rstrip()
    if not stripped:
        raise UserError(f"{where}: the template {preview(template)} has no text before the answer")
    return stripped, prompt[len(stripped) :] + names[last].strip() + after.rstrip()
