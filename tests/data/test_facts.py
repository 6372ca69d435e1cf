"""Facts that are planted in training samples, and needles of recall."""

import json
import re
from collections import Counter
from dataclasses import replace
from importlib import resources

import numpy as np
import pytest

from new_llm.config import DataConfig
from new_llm.config.evaluation import MAX_CANDIDATES
from new_llm.data.batches import plan_batches
from new_llm.data.recall_facts import (
    SamplePlanter,
    SentenceBorders,
    _read_facts,
    choose_place,
    draw_needle,
    draw_pairs_of_facts,
    is_key_of,
)
from new_llm.data.tokenizer import TokenSplit, tokenize_documents, train_tokenizer

FACTS = json.loads(resources.files("new_llm.data").joinpath("recall_facts.json").read_text())
CONFIG = DataConfig(order="shuffled", planted_facts=10, planted_distance=(20, 60), planted_made_up=0)


@pytest.fixture(scope="module")
def tokenizer(speeches):
    return train_tokenizer(speeches, 512)


@pytest.fixture(scope="module")
def split(speeches, tokenizer) -> TokenSplit:
    return tokenize_documents([" ".join(speeches), *speeches], tokenizer)


def find_statements(
    text: str, part: str, value: str | None = None, name: str | None = None
) -> list[tuple[int, str, str]]:
    """Place, question and answer of each."""
    names = "|".join(map(re.escape, FACTS[part]["first_names"]))
    surnames = "|".join(map(re.escape, FACTS[part]["surnames"]))
    found = []
    for relation in FACTS["relations"]:
        prompt = re.escape(relation["prompt"]).replace(r"\{name\}", name or f"(?:{names}) (?:{surnames})")
        values = value or "|".join(map(re.escape, relation[part]))
        matches = re.finditer(f"({prompt})( (?:{values})\\.)", text)
        found += [(match.start(), match.group(1), match.group(2)) for match in matches]
    return sorted(found)


def test_each_fact_is_stated_twice_and_its_second_answer_marked_and_nothing_else_changes(split, tokenizer):
    planter = SamplePlanter(tokenizer, CONFIG, seed=3)
    total = num_twice = 0
    for begin in range(0, 4000, 500):
        sample = split.document(0)[begin : begin + 500].astype(np.int64)
        before = sample.copy()
        planted = planter.plant(sample, 0, begin)
        assert (sample == before).all()
        assert planted.tokens.shape == planted.is_answer.shape == sample.shape
        text = tokenizer.decode(planted.tokens.tolist(), skip_special_tokens=False)
        statements = find_statements(text, "train")
        assert find_statements(text, "eval") == []
        counts = Counter(statement[1:] for statement in statements)
        assert set(counts.values()) <= {1, 2}  # a second one may have been pushed out of the sample's end
        assert len({question for question, _ in counts}) == len(counts)
        rest = text
        for _, question, answer in statements:
            rest = rest.replace(f" {question}{answer}", "", 1)
        whole = tokenizer.decode(sample.tolist(), skip_special_tokens=False)
        assert whole.startswith(rest[: len(rest) - 60])  # a statement may be cut by the end
        twice = [one for one, count in counts.items() if count == 2]
        edges = np.flatnonzero(np.diff(planted.is_answer.astype(int), prepend=0, append=0)).reshape(-1, 2)
        marked = [tokenizer.decode(planted.tokens[a:b].tolist()) for a, b in edges]
        for question, answer in twice:
            assert answer in marked
            place = text.index(question, text.index(question) + 1)  # the second one
            assert tokenizer.decode(planted.tokens[: edges[marked.index(answer)][0]].tolist()).endswith(question)
            assert text[place + len(question) :].startswith(answer)
        assert len(marked) <= len(twice) + 1  # one may have been cut
        total, num_twice = total + len(statements), num_twice + len(twice)
    assert total > 20
    assert num_twice > 10


@pytest.mark.parametrize("made_up", [0, 1])
def test_a_changed_fact_is_asked_for_after_both_its_statements(split, tokenizer, made_up):
    config = replace(CONFIG, planted_tasks=("changed",), planted_distance=(2, 60), planted_made_up=made_up)
    planter = SamplePlanter(tokenizer, config, seed=0)
    found = 0
    for begin in range(0, 4000, 500):
        planted = planter.plant(split.document(0)[begin : begin + 500].astype(np.int64), 0, begin)
        edges = np.flatnonzero(np.diff(planted.is_answer.astype(int), prepend=0, append=0)).reshape(-1, 2)
        for start, end in edges[:-1]:  # the last one may have been cut
            before = tokenizer.decode(planted.tokens[:start].tolist())
            (question,) = [
                one.group()
                for relation in FACTS["relations"]
                if (one := re.search(re.escape(relation["prompt"]).replace(r"\{name\}", NAME) + "$", before))
            ]
            old, new, asked = (text.split(".")[0] + "." for text in before.split(question)[1:])
            assert old != new == tokenizer.decode(planted.tokens[start:end].tolist())
            assert asked == "."
            found += 1
    assert found > 10


@pytest.mark.parametrize("made_up", [0, 1])
def test_a_fact_told_backward_ends_with_its_name(split, tokenizer, made_up):
    """Before it the same fact is told forward, and only the name is marked; a sample's values are of one relation."""
    config = replace(CONFIG, planted_backward=1.0, planted_made_up=made_up, planted_relations=1)
    planter, found = SamplePlanter(tokenizer, config, seed=0), 0
    for begin in range(0, 4000, 500):
        planted = planter.plant(split.document(0)[begin : begin + 500].astype(np.int64), 0, begin)
        edges = np.flatnonzero(np.diff(planted.is_answer.astype(int), prepend=0, append=0)).reshape(-1, 2)
        values: list[str] = []
        for first, last in edges[edges[:, 1] < 500]:
            before, name = (tokenizer.decode(planted.tokens[a:b].tolist()) for a, b in ((0, first), (first, last)))
            if not values:
                (relation,) = [r for r in FACTS["relations"] if before.endswith(r["backward"].partition("{value}")[2])]
                start, _, end = relation["backward"].partition("{value}")
            assert before.endswith(end)
            values.append(before[before.rindex(start) + len(start) : -len(end)])
            assert f"{relation['prompt'].format(name=name.strip(' .'))} {values[-1]}." in before
        assert len(set(values)) == len(values)
        found += len(values)
    assert found > 10


NAME = "[A-Z][A-Za-z]+ [A-Z][A-Za-z]+"


def read_made_up(text: str) -> tuple[set[str], set[str]]:
    """The names and the values of all statements."""
    found = find_statements(text, "train", value="[A-Za-z]+", name=NAME)
    prompts = [re.escape(relation["prompt"]).replace(r"\{name\}", f"({NAME})") for relation in FACTS["relations"]]
    matches = [re.fullmatch(prompt, question) for _, question, _ in found for prompt in prompts]
    names = {name for match in matches if match for name in match.group(1).split()}
    return names, {answer.strip(" .") for _, _, answer in found}


def test_made_up_names_and_values_are_of_no_list(split, tokenizer):
    planter = SamplePlanter(tokenizer, replace(CONFIG, planted_made_up=1), seed=1)
    sample = split.document(0)[:500].astype(np.int64)
    own = set(re.findall(r"[A-Za-z]+", tokenizer.decode(sample.tolist())))
    names, values = set(), set()
    for epoch in range(20):
        planted = planter.plant(sample, epoch, 0)
        found = read_made_up(tokenizer.decode(planted.tokens.tolist(), skip_special_tokens=False))
        names |= found[0]
        values |= found[1]
    listed = {value for relation in FACTS["relations"] for value in relation["train"] + relation["eval"]}
    people = {name for part in ("train", "eval") for names_of in FACTS[part].values() for name in names_of}
    assert len(names) > 20
    assert not names & people
    assert len(values) > 20
    assert len(values & listed) <= 1
    share = len(values & own) / len(values)
    assert 0.2 < share < 0.8  # words of the text, and made-up ones


def test_the_distances_are_those_asked_for(split, tokenizer):
    config = replace(CONFIG, planted_facts=2, planted_distance=(200, 400))
    planter = SamplePlanter(tokenizer, config, seed=0)
    distances = []
    for epoch in range(10):
        planted = planter.plant(split.document(0)[:3000].astype(np.int64), epoch, 0)
        text = tokenizer.decode(planted.tokens.tolist(), skip_special_tokens=False)
        places: dict[str, list[int]] = {}
        for place, question, _ in find_statements(text, "train"):
            places.setdefault(question, []).append(len(tokenizer.encode(text[:place]).ids))
        distances += [found[1] - found[0] for found in places.values() if len(found) == 2]
    assert len(distances) > 10
    assert min(distances) >= 100
    assert max(distances) <= 800


def test_facts_depend_on_seed_epoch_and_sample_alone(split, tokenizer):
    sample = split.document(0)[:500].astype(np.int64)

    def plant(seed, epoch, begin):
        return SamplePlanter(tokenizer, CONFIG, seed).plant(sample, epoch, begin).tokens.tolist()

    assert plant(1, 0, 0) == plant(1, 0, 0)
    assert len({tuple(plant(*key)) for key in [(1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1)]}) == 4


def test_a_plan_plants_and_weighs_but_not_in_pinned_documents(split, tokenizer):
    pinned = replace(split, num_pinned_documents=1)
    options = {"seq_length": 256, "batch_size": 3, "order": "shuffled", "seed": 0, "epoch": 2}
    planter = SamplePlanter(tokenizer, CONFIG, seed=0)
    plain = plan_batches(pinned, **options)
    plan = plan_batches(pinned, **options, planter=planter, answer_weight=7.0)
    assert len(plan) == len(plain)
    num_answers = 0
    for index, (before, after) in enumerate(zip(plain, plan, strict=True)):
        assert before.label_weights is None
        assert before.num_targets == after.num_targets
        weights = after.label_weights
        assert weights.shape == after.labels.shape
        assert set(weights.unique().tolist()) <= {1.0, 7.0}
        assert (after.labels[:, :-1] == after.input_ids).all() or before.attention_mask is not None
        assert ((before.labels == -100) == (after.labels == -100)).all()
        for row, sample in enumerate(plan.rows[index][plan.rows[index] >= 0]):
            begin = plan.starts[sample]
            if begin < pinned.offsets[1]:
                assert (before.labels[row] == after.labels[row]).all()
                assert (weights[row] == 1).all()
            else:
                wanted = planter.plant(pinned.tokens[begin : begin + 257].astype(np.int64), 2, int(begin)).is_answer
                if (before.labels[row] != -100).all():
                    assert ((weights[row] == 7).numpy() == wanted).all()
        num_answers += int((weights == 7).sum())
    assert num_answers > 20
    later = plan_batches(pinned, **(options | {"epoch": 3}), planter=planter)
    assert [batch.input_ids.tolist() for batch in plan] != [batch.input_ids.tolist() for batch in later]
    halves = [plan.take_rows(slice(0, 2)), plan.take_rows(slice(2, 3))]
    whole = plan[0]
    assert (whole.input_ids == np.concatenate([half[0].input_ids for half in halves])).all()


# recall facts


TEXT = (
    "Four score and seven years ago our fathers brought forth a new nation. Now we are engaged in a great "
    'civil war. "Can it endure?" We are met on a great battle-field of that war. It is fitting and proper '
    "that we should do this. The world will little note what we say here! It can never forget what they did. "
)
TOKENIZER = train_tokenizer([TEXT], 330)
TOKENS = np.array(TOKENIZER.encode(TEXT * 4).ids)
BORDERS = SentenceBorders(TOKENIZER)


@pytest.mark.parametrize("task", ["passkey", "facts", "changed"])
@pytest.mark.parametrize("part", ["train", "eval"])
def test_a_needle_is_a_question_with_its_answer(task, part):
    for trial in range(40):
        needle = draw_needle(task, part, 10, np.random.default_rng(trial))
        assert needle.statement.startswith(needle.prompt + needle.answer)
        assert needle.replaced == (needle.prompt + needle.candidates[1] if task == "changed" else "")
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


@pytest.mark.parametrize("one_relation", [True, False])
def test_facts_in_both_directions_share_no_name(one_relation):
    pairs = draw_pairs_of_facts("eval", 50, 4, seed=0, one_relation=one_relation)
    assert len({pair.subject for pair in pairs}) == len(pairs) == 200
    for begin in range(0, 200, 4):
        text = pairs[begin : begin + 4]
        assert len({pair.object for pair in text}) == 4
        assert len({pair.forward_prompt.replace(pair.subject, "") for pair in text}) == (1 if one_relation else 4)
        for pair in text:
            assert pair.forward == pair.forward_prompt + f" {pair.object}."
            assert pair.backward == pair.backward_prompt + f" {pair.subject}."


def test_borders_are_between_sentences():
    found = BORDERS.find_sentences(TOKENS)
    before = [TOKENIZER.decode(TOKENS[:place].tolist())[-1] for place in found]
    after = [TOKENIZER.decode(TOKENS[place:].tolist())[0] for place in found]
    assert set(before) == {".", "!", '"'}
    assert set(after) == {" "}
    assert len(found) == 4 * 7  # the last full stop has white space after it, too
    assert set(found) <= set(BORDERS.find_words(TOKENS))


@pytest.mark.parametrize("segment_length", [40, 64])
@pytest.mark.parametrize("depth", [0, 0.3, 0.5, 1])
def test_a_sentence_is_put_near_its_depth_and_not_across_segments(segment_length, depth):
    length = 17
    place = choose_place(TOKENS, length, depth, segment_length, BORDERS)
    assert abs(place - depth * len(TOKENS)) <= segment_length / 2
    assert place // segment_length == (place + length - 1) // segment_length
    assert place == 0 or place in BORDERS.find_words(TOKENS)
