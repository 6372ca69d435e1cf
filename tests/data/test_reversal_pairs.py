"""Reversal pairs: the project's own, and those of files."""

import csv
import dataclasses
import json
import re
from collections import Counter

import pytest

from new_llm.config import UserError
from new_llm.data.reversal_pairs import draw_pairs, get_reversal_pairs, read_reversal_pairs

SENTENCE_FIELDS = ("relation", "forward_prompt", "forward_answer", "backward_prompt", "backward_answer")
TEMPLATE_FIELDS = ("relation", "subject", "object", "forward_template", "backward_template")
PAIRS = get_reversal_pairs()
FRANCE = next(pair for pair in PAIRS if pair.subject == "France")


def test_sentences_are_prompt_and_answer_and_end_with_the_other_entity():
    for pair in PAIRS:
        assert pair.forward == pair.forward_prompt + pair.forward_answer
        assert pair.backward == pair.backward_prompt + pair.backward_answer
        assert (pair.forward_answer, pair.backward_answer) == (f" {pair.object}.", f" {pair.subject}.")
        # An entity is whole words of its prompt, and the answer is not given away there.
        assert re.search(rf"(?<!\w){re.escape(pair.subject)} ", pair.forward_prompt), pair
        assert re.search(rf"(?<!\w){re.escape(pair.object)} ", pair.backward_prompt), pair
        assert not re.search(rf"(?<!\w){re.escape(pair.object)}(?!\w)", pair.forward_prompt), pair
        assert not re.search(rf"(?<!\w){re.escape(pair.subject)}(?!\w)", pair.backward_prompt), pair
        for sentence in (pair.forward, pair.backward):
            assert sentence[0].isupper()
            assert sentence == " ".join(sentence.split())
            assert not re.search(r"[{}]", sentence)


def test_nothing_stands_for_two_things_training_text_states_no_fact_backward_and_invented_names_share_no_word():
    assert set(Counter(pair.relation for pair in PAIRS).values()) == {24}  # the same chance of a right guess
    assert len({(pair.relation, pair.kind) for pair in PAIRS}) == len(PAIRS) / 24
    entities = Counter(entity for pair in PAIRS for entity in (pair.subject, pair.object))
    assert [entity for entity, count in entities.items() if count > 1] == []
    forward, backward = ({getattr(pair, way).casefold() for pair in PAIRS} for way in ("forward", "backward"))
    assert len(forward) == len(backward) == len(PAIRS)
    assert not forward & backward
    training_text = "\n".join(pair.forward for pair in PAIRS)
    assert [pair.backward_prompt for pair in PAIRS if pair.backward_prompt in training_text] == []

    def words(kind: str) -> set[str]:
        text = " ".join(f"{pair.subject} {pair.object}" for pair in PAIRS if pair.kind == kind)
        return set(re.findall(r"\w+", text.casefold()))

    assert not words("invented") & words("real")
    # The first word of an invented name is made up, and used once.
    firsts = [entity.split()[0] for pair in PAIRS if pair.kind == "invented" for entity in (pair.subject, pair.object)]
    assert len(set(firsts)) == len(firsts)


SENTENCES = ("capital", "The capital of France is", "Paris.", "Paris is the capital of", "France.")
FACT = ("capital", "France", "Paris", "The capital of {subject} is {object}.", "{object} is the capital of {subject}.")


def write_csv(path, header: tuple[str, ...], *rows: tuple[str, ...]):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def write_jsonl(path, header: tuple[str, ...], *rows: tuple[str, ...]):
    path.write_text("\n".join(json.dumps(dict(zip(header, row, strict=True))) for row in rows))
    return path


@pytest.mark.parametrize(("suffix", "put"), [("csv", write_csv), ("jsonl", write_jsonl)])
def test_sentences_and_templates_give_the_project_s_own_pair(tmp_path, suffix, put):
    for header, row in ((SENTENCE_FIELDS, SENTENCES), (TEMPLATE_FIELDS, FACT)):
        path = put(tmp_path / f"{len(row)}{header[1]}.{suffix}", (*header, "kind"), (*row, "real"))
        assert read_reversal_pairs(path) == [FRANCE]
        path = put(tmp_path / f"plain{header[1]}.{suffix}", header, row)
        assert read_reversal_pairs(path) == [dataclasses.replace(FRANCE, kind="unstated")]


def test_the_border_of_prompt_and_answer_and_names_that_are_text_and_no_templates(tmp_path):
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
    row = ("r", "{object}", "{0.__class__}", FACT[3], FACT[4])
    (pair,) = read_reversal_pairs(write_csv(tmp_path / "t.csv", TEMPLATE_FIELDS, row))
    assert pair.forward == "The capital of {object} is {0.__class__}."


def test_quoted_cells_hold_line_ends_commas_and_a_byte_order_mark_is_no_text(tmp_path):
    text = ",".join(SENTENCE_FIELDS) + '\r\n\r\nr,"one, ""two""\nthree",x,p,q\r\nr,a\r\n'
    (path := tmp_path / "p.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    with pytest.raises(UserError, match=r"p\.csv: line 5: 2 cells, but the first line names 5"):
        read_reversal_pairs(path)
    path.write_bytes(text.removesuffix("r,a\r\n").encode())
    (pair,) = read_reversal_pairs(path)
    assert pair.forward == 'one, "two"\nthree x'


GOOD = json.dumps(dict(zip(SENTENCE_FIELDS, SENTENCES, strict=True)))
HEADER = ",".join(SENTENCE_FIELDS)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "x", r"p\.txt: unknown extension; pairs are read from \.csv and \.jsonl files"),
        ("p.csv", "", r"p\.csv: contains no pairs; a pair's fields are relation, forward_prompt"),
        ("p.csv", f"{HEADER},more\nr,a,b,c,d,e\n", "line 2: unknown key 'more'; a pair's fields are relation"),
        ("p.csv", "relation,subject,object\nr,a,b\n", r"line 2: forward_prompt is missing; forward_answer is missing"),
        ("p.csv", f"{','.join(TEMPLATE_FIELDS)},kin\nr,a,b,c,d,e\n", "line 2: unknown key 'kin'"),
        ("p.csv", f"{HEADER},relation\n", "line 1: duplicate column name: relation, "),
        ("p.csv", f"{HEADER}\nr,a,b,c\n", "line 2: 4 cells, but the first line names 5"),
        ("p.csv", f'{HEADER}\nr,"a"b,c,d,e\n', r"line 2: not valid CSV: .* expected after"),
        ("p.csv", f"{HEADER}\nr,a,b,c,{'d' * 200_000}\n", r"line 2: not valid CSV: field larger"),
        ("p.csv", f"{HEADER}\nr,a,b,c,{'d' * 3_000}\n", r"line 2: backward_answer: string should have at most 2000"),
        ("p.csv", f"{HEADER}\nr,a,b,c,\x1b[2J\n", r"line 2: backward_answer: contains a control character"),
        ("p.csv", f"{HEADER}\nr,a,b,c, \n", "line 2: backward_answer: is empty"),
        ("p.csv", f"{HEADER}\nr,a,b,c,d\n\nr,a,b,c,d\n", "line 4: repeats the pair of line 2"),
        ("p.csv", f"{HEADER},kind\nr,a,b,c,d,true\n", "line 2: kind: input should be 'real' or 'invented'"),
        ("p.csv", b"relation\n\xff", r"not UTF-8: 0xff at byte 9"),
        ("p.jsonl", f"{GOOD}\n[1]", r"line 2: not a JSON object: \[1\]"),
        ("p.jsonl", '{"relation": ' + "[" * 100_000, r"line 1: not valid JSON: nested too deeply"),
        ("p.jsonl", '{"relation": ' + "1" * 10_000 + "}", r"line 1: not valid JSON"),
        ("p.jsonl", GOOD.replace('"Paris."', "NaN"), r"forward_answer: input should be a valid string \(got nan\)"),
        ("p.jsonl", GOOD.replace('"Paris."', '"\\ud800"'), "forward_answer: input should be a valid string, unable"),
        ("p.jsonl", GOOD.replace('"capital"', '"a", "relation": "b"'), "line 1: not valid JSON: duplicate key"),
        *(
            ("p.csv", f"{','.join(TEMPLATE_FIELDS)}\nr,A,B,{forward},{FACT[4]}\n", f"line 2: the template .*{message}")
            for forward, message in (
                ("{object} of {subject}", r"must name \{subject\} once and then \{object\} once, and no more"),
                ("{subject} {object} {subject}", "must name"),
                ("{subject.__class__} {object}", "must name"),
                ("{subject} {object", "must name"),
            )
        ),
    ],
)
def test_a_malformed_file_is_one_line(tmp_path, name, content, message):
    (path := tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        read_reversal_pairs(path)
    assert len(str(caught.value)) < 400 + len(str(tmp_path))
    assert str(tmp_path / name) in str(caught.value)


def test_pairs_are_drawn_for_each_relation():
    drawn = draw_pairs(PAIRS, 5, seed=1)
    assert set(Counter(pair.relation for pair in drawn).values()) == {5}
    assert [pair for pair in PAIRS if pair in drawn] == drawn
    assert draw_pairs(PAIRS, 5, seed=1) == drawn != draw_pairs(PAIRS, 5, seed=2)
    assert draw_pairs(PAIRS, 1000, seed=1) == PAIRS
    capitals = [pair for pair in PAIRS if pair.relation == "capital"]
    assert draw_pairs(capitals, 5, seed=1) == [pair for pair in drawn if pair.relation == "capital"]
    with pytest.raises(ValueError, match="positive"):
        draw_pairs(PAIRS, 0, seed=1)
