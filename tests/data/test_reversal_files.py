import csv
import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from new_llm.config import UserError
from new_llm.data.reversal_pairs import (
    SENTENCE_FIELDS,
    TEMPLATE_FIELDS,
    draw_pairs,
    get_reversal_pairs,
    read_reversal_pairs,
)

SENTENCES = ("capital", "The capital of France is", "Paris.", "Paris is the capital of", "France.")
FACT = ("capital", "France", "Paris", "The capital of {subject} is {object}.", "{object} is the capital of {subject}.")


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def write_csv(path: Path, header: tuple[str, ...], *rows: tuple[str, ...]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def write_jsonl(path: Path, header: tuple[str, ...], *rows: tuple[str, ...]) -> Path:
    return write(path, "\n".join(json.dumps(dict(zip(header, row, strict=True))) for row in rows))


@pytest.mark.parametrize(("suffix", "put"), [("csv", write_csv), ("jsonl", write_jsonl)])
def test_sentences_and_templates_give_the_project_s_own_pair(tmp_path, suffix, put):
    france = next(pair for pair in get_reversal_pairs() if pair.subject == "France")
    for header, row in ((SENTENCE_FIELDS, SENTENCES), (TEMPLATE_FIELDS, FACT)):
        path = put(tmp_path / f"{len(row)}{header[1]}.{suffix}", (*header, "kind"), (*row, "real"))
        assert read_reversal_pairs(path) == [france]
        path = put(tmp_path / f"plain{header[1]}.{suffix}", header, row)
        assert read_reversal_pairs(path) == [dataclasses.replace(france, kind="unstated")]


def test_the_border_of_prompt_and_answer(tmp_path):
    rows = [
        ("a", "x loves", "y.", "y likes", "x."),
        ("b", "x loves ", "y.", "y likes", " x. "),
        ("c", 'x says: "', '"y"', "y,\tsays", "x\n"),
    ]
    first, second, third = read_reversal_pairs(write_csv(tmp_path / "p.csv", SENTENCE_FIELDS, *rows))
    assert (first.forward_prompt, first.forward_answer, first.forward) == ("x loves", " y.", "x loves y.")
    assert dataclasses.replace(second, relation="a") == first
    assert (third.forward, third.backward) == ('x says: " "y"', "y,\tsays x")
    template = ("d", "A", "B", "{subject}({object})", "{object}: {subject}, of course.")
    (pair,) = read_reversal_pairs(write_csv(tmp_path / "t.csv", TEMPLATE_FIELDS, template))
    assert (pair.forward_prompt, pair.forward_answer) == ("A(", "B)")
    assert (pair.backward_prompt, pair.backward_answer) == ("B:", " A, of course.")


def test_names_are_text_and_no_templates(tmp_path):
    row = ("r", "{object}", "{0.__class__}", FACT[3], FACT[4])
    (pair,) = read_reversal_pairs(write_csv(tmp_path / "p.csv", TEMPLATE_FIELDS, row))
    assert pair.forward == "The capital of {object} is {0.__class__}."


def test_quoted_cells_hold_line_ends_commas_and_a_byte_order_mark_is_no_text(tmp_path):
    text = ",".join(SENTENCE_FIELDS) + '\r\n\r\nr,"one, ""two""\nthree",x,p,q\r\nr,a\r\n'
    path = write(tmp_path / "p.csv", b"\xef\xbb\xbf" + text.encode())
    with pytest.raises(UserError, match=r"p\.csv: line 5: 2 cells, but the first line names 5"):
        read_reversal_pairs(path)
    (pair,) = read_reversal_pairs(write(path, text.removesuffix("r,a\r\n")))
    assert pair.forward == 'one, "two"\nthree x'


GOOD = json.dumps(dict(zip(SENTENCE_FIELDS, SENTENCES, strict=True)))
HEADER = ",".join(SENTENCE_FIELDS)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "x", r"p\.txt: pairs are read from \.csv and \.jsonl files"),
        ("p.csv", "", r"p\.csv: holds no pair; a pair's fields are relation, forward_prompt"),
        ("p.csv", HEADER, "holds no pair"),
        ("p.csv", "relation,forward\n", r"line 1: unknown field 'forward'; allowed are relation, forward_prompt"),
        ("p.csv", "relation,subject,object\n", r"line 1: no field 'forward_prompt'; a pair's fields are"),
        ("p.csv", "relation,subject,object,forward_template\n", "line 1: no field 'backward_template'"),
        ("p.csv", f"{HEADER},forward_template\n", "line 1: no field 'subject'"),
        ("p.csv", f"{','.join(TEMPLATE_FIELDS)},forward_answer\n", "line 1: 'forward_answer' beside templates"),
        ("p.csv", f"{HEADER},relation\n", "line 1: duplicate field 'relation'"),
        ("p.csv", f"{HEADER}\nr,a,b,c\n", "line 2: 4 cells, but the first line names 5"),
        ("p.csv", f"{HEADER}\nr,a,b, ,d\n", "line 2: backward_prompt: is empty"),
        ("p.csv", f'{HEADER}\nr,"a"b,c,d,e\n', r"line 2: not valid CSV: .* expected after"),
        ("p.csv", f'{HEADER}\nr,a,b,c,"d\n', r"line 2: not valid CSV: unexpected end of data"),
        ("p.csv", f"{HEADER}\nr,a,b,c,{'d' * 200_000}\n", r"line 2: not valid CSV: field larger"),
        ("p.csv", f"{HEADER}\nr,a,b,c,{'d' * 3_000}\n", r"line 2: backward_answer: 3,000 characters; at most 2,000"),
        ("p.csv", f"{HEADER}\nr,a,b,c,\x1b[2J\n", r"line 2: backward_answer: holds the control character"),
        ("p.csv", f"{HEADER}\nr,a,b,c,d\n\nr,a,b,c,d\n", "line 4: repeats the pair of line 2"),
        ("p.csv", f"{HEADER},kind\nr,a,b,c,d,true\n", "line 2: kind: 'true' is neither real nor invented"),
        ("p.csv", b"relation\n\xff", r"not UTF-8: 0xff at byte 9"),
        ("p.jsonl", f"{GOOD}\n[1]", r"line 2: not a JSON object: '\[1\]'"),
        ("p.jsonl", "{" * 100_000, r"line 1: not a JSON object"),
        ("p.jsonl", '{"relation": ' + "[" * 100_000, r"line 1: not a JSON object"),
        ("p.jsonl", '{"relation": ' + "1" * 10_000 + "}", r"line 1: not"),
        ("p.jsonl", GOOD.replace('"Paris."', "NaN"), r"line 1: forward_answer: nan is not a string"),
        ("p.jsonl", GOOD.replace('"Paris."', '"\\ud800"'), r"line 1: forward_answer: holds .*lone surrogate"),
        ("p.jsonl", GOOD.replace('"capital"', '"a", "relation": "b"'), "line 1: duplicate field 'relation'"),
        ("p.jsonl", "null", "line 1: not a JSON object"),
        ("p.jsonl", "{}", "line 1: no field 'relation'"),
    ],
)
def test_a_malformed_file_is_one_line(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message) as caught:
        read_reversal_pairs(write(tmp_path / name, content))
    assert len(str(caught.value)) < 400 + len(str(tmp_path))
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        ("{object} of {subject}", r"must name \{subject\} once and then \{object\} once"),
        ("{subject} is", "must name"),
        ("{subject} {object} {subject}", "must name"),
        ("{subject!r} {object}", "must name"),
        ("{subject.__class__} {object}", "must name"),
        ("{subject} {object", "must name"),
        ("{} {subject} {object}", "must name"),
    ],
)
def test_a_bad_template_is_one_line(tmp_path, forward, message):
    path = write_csv(tmp_path / "p.csv", TEMPLATE_FIELDS, FACT, ("r", "A", "B", forward, FACT[4]))
    with pytest.raises(UserError, match=rf"line 3: forward_template: .*{message}"):
        read_reversal_pairs(path)


@settings(deadline=None, max_examples=100)
@given(content=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode)), name=st.sampled_from("cj"))
def test_no_content_raises_anything_else(tmp_path_factory, content, name):
    path = tmp_path_factory.mktemp("hostile") / {"c": "p.csv", "j": "p.jsonl"}[name]
    with pytest.raises(UserError):
        read_reversal_pairs(write(path, content))


def test_pairs_are_drawn_for_each_relation():
    pairs = get_reversal_pairs()
    drawn = draw_pairs(pairs, 5, seed=1)
    assert set(Counter(pair.relation for pair in drawn).values()) == {5}
    assert [pair for pair in pairs if pair in drawn] == drawn
    assert draw_pairs(pairs, 5, seed=1) == drawn != draw_pairs(pairs, 5, seed=2)
    assert draw_pairs(pairs, 1000, seed=1) == pairs
    capitals = [pair for pair in pairs if pair.relation == "capital"]
    assert draw_pairs(capitals, 5, seed=1) == [pair for pair in drawn if pair.relation == "capital"]
    with pytest.raises(ValueError, match="positive"):
        draw_pairs(pairs, 0, seed=1)
