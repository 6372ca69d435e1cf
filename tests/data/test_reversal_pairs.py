import re
from collections import Counter
from dataclasses import FrozenInstanceError

import pytest

from new_llm.data.reversal_pairs import ReversalPair, get_reversal_pairs

PAIRS = get_reversal_pairs()
RELATIONS = sorted({pair.relation for pair in PAIRS})


def in_relation(relation: str) -> list[ReversalPair]:
    return [pair for pair in PAIRS if pair.relation == relation]


def test_there_are_enough_facts_in_enough_relations():
    kinds = Counter(pair.kind for pair in PAIRS)
    assert kinds["real"] >= 120
    assert kinds["invented"] >= 30
    assert set(kinds) == {"real", "invented"}
    assert len({pair.relation for pair in PAIRS if pair.kind == "real"}) >= 6
    assert len({pair.relation for pair in PAIRS if pair.kind == "invented"}) >= 2


def test_every_relation_has_one_kind_and_the_same_chance_of_a_right_guess():
    assert {len(in_relation(relation)) for relation in RELATIONS} == {24}
    assert all(len({pair.kind for pair in in_relation(relation)}) == 1 for relation in RELATIONS)


def test_a_known_fact_reads_as_documented():
    france = next(pair for pair in PAIRS if pair.subject == "France")
    assert france == ReversalPair(
        relation="capital",
        subject="France",
        object="Paris",
        kind="real",
        forward="The capital of France is Paris.",
        backward="Paris is the capital of France.",
        forward_prompt="The capital of France is",
        forward_answer=" Paris.",
        backward_prompt="Paris is the capital of",
        backward_answer=" France.",
    )
    with pytest.raises(FrozenInstanceError):
        france.object = "Lyon"  # pyright: ignore[reportAttributeAccessIssue]


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


def test_no_entity_stands_for_two_things():
    # Unique over the whole list, so also in each relation and direction.
    entities = Counter(entity for pair in PAIRS for entity in (pair.subject, pair.object))
    assert [entity for entity, count in entities.items() if count > 1] == []


def test_sentences_are_unique_and_no_backward_sentence_is_a_forward_one():
    forward = {pair.forward.casefold() for pair in PAIRS}
    backward = {pair.backward.casefold() for pair in PAIRS}
    assert len(forward) == len(backward) == len(PAIRS)
    assert not forward & backward


def test_training_text_does_not_state_a_fact_backwards():
    training_text = "\n".join(pair.forward for pair in PAIRS)
    assert [pair.backward for pair in PAIRS if pair.backward in training_text] == []
    assert [pair.backward_prompt for pair in PAIRS if pair.backward_prompt in training_text] == []


def test_invented_names_share_no_word_with_real_facts():
    def words(kind: str) -> set[str]:
        text = " ".join(f"{pair.subject} {pair.object}" for pair in PAIRS if pair.kind == kind)
        return set(re.findall(r"\w+", text.casefold()))

    assert not words("invented") & words("real")
    # The first word of an invented name is made up, and used once.
    firsts = [entity.split()[0] for pair in PAIRS if pair.kind == "invented" for entity in (pair.subject, pair.object)]
    assert len(set(firsts)) == len(firsts)
