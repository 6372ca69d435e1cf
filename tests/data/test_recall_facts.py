import numpy as np
import pytest

from new_llm.config.evaluation import MAX_CANDIDATES
from new_llm.data.recall_facts import (
    SentenceBorders,
    _read_facts,
    choose_place,
    draw_needle,
    encode_sentence,
    is_key_of,
    plant_sentence,
)
from new_llm.data.tokenizer import train_tokenizer

TEXT = (
    "Four score and seven years ago our fathers brought forth a new nation. Now we are engaged in a great "
    'civil war. "Can it endure?" We are met on a great battle-field of that war. It is fitting and proper '
    "that we should do this. The world will little note what we say here! It can never forget what they did. "
)
TOKENIZER = train_tokenizer([TEXT], 330)
TOKENS = np.array(TOKENIZER.encode(TEXT * 4).ids)
BORDERS = SentenceBorders(TOKENIZER)


@pytest.mark.parametrize("task", ["passkey", "facts"])
@pytest.mark.parametrize("part", ["train", "eval"])
def test_a_needle_is_a_question_with_its_answer(task, part):
    for trial in range(40):
        needle = draw_needle(task, part, 10, np.random.default_rng(trial))
        assert needle.statement.startswith(needle.prompt + needle.answer)
        assert needle.candidates[0] == needle.answer
        assert len(set(needle.candidates)) == 10
        assert all(candidate[0] == " " and candidate[-1] == "." for candidate in needle.candidates)
        assert needle.prompt == needle.prompt.strip()
        assert needle == draw_needle(task, part, 10, np.random.default_rng(trial))


def test_train_and_eval_share_no_name_value_or_key():
    parts = {part: _read_facts(part) for part in ("train", "eval")}
    for names in ("first_names", "surnames"):
        assert not set(parts["train"][0][names]) & set(parts["eval"][0][names])
    for relation in parts["eval"][1]:
        assert not set(relation["train"]) & set(relation["eval"])
        assert len(set(relation["train"])) == len(set(relation["eval"])) == MAX_CANDIDATES
    keys = {part: set() for part in parts}
    for part, found in keys.items():
        for trial in range(300):
            needle = draw_needle("passkey", part, 10, np.random.default_rng(trial))
            found.update(int(answer.strip(" .")) for answer in needle.candidates)
    assert not keys["train"] & keys["eval"]
    assert all(is_key_of(key, "train") != is_key_of(key, "eval") for key in range(10_000, 10_200))
    assert np.mean([is_key_of(key, "eval") for key in range(10_000, 20_000)]) == pytest.approx(0.2, abs=0.02)


def test_borders_are_between_sentences():
    found = BORDERS.find_sentences(TOKENS)
    before = [TOKENIZER.decode(TOKENS[:place].tolist())[-1] for place in found]
    after = [TOKENIZER.decode(TOKENS[place:].tolist())[0] for place in found]
    assert set(before) == {".", "!", '"'}
    assert set(after) == {" "}
    assert len(found) == 4 * 7  # the last full stop has white space after it, too
    assert set(found) <= set(BORDERS.find_words(TOKENS))


def test_a_planted_sentence_reads_as_written():
    sentence = encode_sentence(TOKENIZER, "The pass key is 71432. Remember it.")
    place = int(BORDERS.find_sentences(TOKENS)[3])
    text = TOKENIZER.decode(plant_sentence(TOKENS, sentence, place).tolist())
    assert "that war. The pass key is 71432. Remember it. It is fitting" in text
    assert text.replace(" The pass key is 71432. Remember it.", "") == TEXT * 4
    assert TOKENIZER.encode(text).ids == plant_sentence(TOKENS, sentence, place).tolist()


@pytest.mark.parametrize("segment_length", [40, 64])
@pytest.mark.parametrize("depth", [0, 0.3, 0.5, 1])
def test_a_sentence_is_put_near_its_depth_and_not_across_segments(segment_length, depth):
    length = 17
    place = choose_place(TOKENS, length, depth, segment_length, BORDERS)
    assert abs(place - depth * len(TOKENS)) <= segment_length / 2
    assert place // segment_length == (place + length - 1) // segment_length
    assert place == 0 or place in BORDERS.find_words(TOKENS)
