"""Facts stated in two directions, to measure the reversal curse: the project's own pairs, and those of a user's file.

A model that has read "The capital of France is Paris." often cannot complete "Paris is the capital of" (the
reversal curse, arXiv:2309.12288). The forward sentences join the training set; the backward ones are never
trained on.

A file is .csv, with names in its first line, or .jsonl. A row states a fact in one of two ways:

- by sentences: relation, forward_prompt, forward_answer, backward_prompt, backward_answer;
- by templates: relation, subject, object, forward_template, backward_template. Each template names {subject} and
  {object} once; the forward one names the object last, the backward one the subject. What stands before the last name
  is the prompt, the rest the answer.

`kind` (real or invented) may stand beside either.
"""

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from new_llm.config import UserError
from new_llm.config.files import read_text_file

FACTS_FILE = "reversal_pairs.json"
SENTENCE_FIELDS = ("relation", "forward_prompt", "forward_answer", "backward_prompt", "backward_answer")
TEMPLATE_FIELDS = ("relation", "subject", "object", "forward_template", "backward_template")
OPTIONAL_FIELDS = ("kind", "subject", "object")
ALLOWED = f"{', '.join(SENTENCE_FIELDS)}; or {', '.join(TEMPLATE_FIELDS)}; with either, kind"
KINDS = ("real", "invented")
MAX_FILE_BYTES = 1 << 26
MAX_FIELD_CHARACTERS = 2000
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
    return [
        _make_pair(
            {
                "relation": relation["relation"],
                "kind": relation["kind"],
                "subject": subject,
                "object": object_,
                "forward_template": relation["forward_prompt"] + " {object}.",
                "backward_template": relation["backward_prompt"] + " {subject}.",
            },
            FACTS_FILE,
        )
        for relation in json.loads(text)["relations"]
        for subject, object_ in relation["facts"]
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
        pair = _make_pair(row, f"{path}: line {number}")
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
    header: list[str] | None = None
    first = 1
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{path}: line {reader.line_num}: not valid CSV: {error}") from None
        if row is None:
            return
        number, first = first, reader.line_num + 1  # a quoted field may hold line ends
        if not any(cell.strip() for cell in row):
            continue
        if header is None:
            header = [name.strip() for name in row]
            _check_fields(header, f"{path}: line {number}")
        elif len(row) != len(header):
            raise UserError(f"{path}: line {number}: {len(row)} cells, but the first line names {len(header)}")
        else:
            yield number, {name: cell for name, cell in zip(header, row, strict=True) if cell or name != "kind"}


def _read_jsonl(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            found = json.loads(line, object_pairs_hook=list)
        except (ValueError, RecursionError):
            raise UserError(f"{where}: not a JSON object: {_preview(line)}") from None
        if not isinstance(found, list) or not all(isinstance(item, tuple) for item in found):
            raise UserError(f"{where}: not a JSON object: {_preview(line)}")
        _check_fields([str(name) for name, _ in found], where)
        yield number, dict(found)


def _check_fields(names: list[str], where: str) -> None:
    """Refuse unknown, repeated and missing names."""
    needed = TEMPLATE_FIELDS if any(name.endswith("_template") for name in names) else SENTENCE_FIELDS
    for name in names:
        if name not in (*SENTENCE_FIELDS, *TEMPLATE_FIELDS, *OPTIONAL_FIELDS):
            raise UserError(f"{where}: unknown field {_preview(name)}; allowed are {ALLOWED}")
        if names.count(name) > 1:
            raise UserError(f"{where}: duplicate field {name!r}")
    for name in needed:
        if name not in names:
            raise UserError(f"{where}: no field {name!r}; a pair's fields are {ALLOWED}")
    for name in names:
        if name not in (*needed, *OPTIONAL_FIELDS):
            raise UserError(f"{where}: {name!r} beside templates; a pair's fields are {ALLOWED}")


def _make_pair(row: dict[str, Any], where: str) -> ReversalPair:
    for name, value in row.items():
        _check_text(name, value, where)
    kind = row.get("kind", "unstated")
    if kind not in KINDS and "kind" in row:
        raise UserError(f"{where}: kind: {_preview(kind)} is neither {' nor '.join(KINDS)}")
    if "forward_template" in row:
        forward = _fill(row, "forward", "subject", "object", where)
        backward = _fill(row, "backward", "object", "subject", where)
    else:
        forward, backward = (
            _join(row[f"{direction}_prompt"], row[f"{direction}_answer"]) for direction in ("forward", "backward")
        )
    return ReversalPair(
        relation=row["relation"].strip(),
        subject=row.get("subject", backward[1].rstrip(".")).strip(),
        object=row.get("object", forward[1].rstrip(".")).strip(),
        kind=cast(Literal["real", "invented", "unstated"], kind),
        forward="".join(forward),
        backward="".join(backward),
        forward_prompt=forward[0],
        forward_answer=forward[1],
        backward_prompt=backward[0],
        backward_answer=backward[1],
    )


def _check_text(name: str, value: Any, where: str) -> None:
    if not isinstance(value, str):
        raise UserError(f"{where}: {name}: {_preview(value)} is not a string")
    if not value.strip():
        raise UserError(f"{where}: {name}: is empty; text is needed")
    if len(value) > MAX_FIELD_CHARACTERS:
        raise UserError(f"{where}: {name}: {len(value):,} characters; at most {MAX_FIELD_CHARACTERS:,} are allowed")
    control = re.search(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", value)
    if control:
        raise UserError(f"{where}: {name}: holds the control character or lone surrogate {control[0]!r}")


def _join(prompt: str, answer: str) -> tuple[str, str]:
    """Prompt and answer with the white space between them put before the answer; one space where there is none."""
    stripped, rest = prompt.rstrip(), answer.lstrip()
    space = prompt[len(stripped) :] + answer[: len(answer) - len(rest)]
    return stripped, (space or " ") + rest.rstrip()


def _fill(row: dict[str, Any], direction: str, first: str, last: str, where: str) -> tuple[str, str]:
    """Prompt and answer of a template."""
    name = f"{direction}_template"
    template = row[name]
    pieces = re.split(r"\{(\w*)\}", template)
    if pieces[1::2] != [first, last] or any(brace in "".join(pieces[0::2]) for brace in "{}"):
        raise UserError(
            f"{where}: {name}: {_preview(template)} must name {{{first}}} once and then {{{last}}} once, and no more"
        )
    before, _, between, _, after = pieces
    prompt = before + row[first].strip() + between
    stripped = prompt.rstrip()
    if not stripped:
        raise UserError(f"{where}: {name}: nothing stands before the answer")
    return stripped, prompt[len(stripped) :] + row[last].strip() + after.rstrip()


def _preview(value: Any) -> str:
    text = repr(value.strip() if isinstance(value, str) else value)
    return text if len(text) <= 50 else text[:49] + "…"
