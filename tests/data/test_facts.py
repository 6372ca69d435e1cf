"""Facts that are planted in training samples, and needles of recall."""

import itertools
import json
import re
from collections import Counter
from dataclasses import replace
from importlib import resources

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel

from model_cases import TEXT
from new_llm.config import DataConfig, UserError
from new_llm.config.evaluation import MAX_CANDIDATES
from new_llm.data import recall_facts
from new_llm.data.batches import plan_batches
from new_llm.data.tokenizer import tokenize_documents, train_tokenizer
from tiny import SPEECHES
from tokenizer_families import train_family

FACTS = json.loads(resources.files("new_llm.data").joinpath("recall_facts.json").read_text())
CONFIG = DataConfig(order="shuffled", planted_facts=10, planted_distance=(20, 60), planted_made_up=0)
TOKENIZER = train_tokenizer(SPEECHES, 512)
SPLIT = tokenize_documents([" ".join(SPEECHES), *SPEECHES], TOKENIZER)
NAME = "[A-Z][A-Za-z]+ [A-Z][A-Za-z]+"


def decode(tokens: np.ndarray) -> str:
    return TOKENIZER.decode(tokens.tolist(), skip_special_tokens=False)


def plant(*, seed: int = 0, size: int = 500, epochs: int = 1, **changes: object):
    """Samples with facts, their text before, and the marked answers: the text before each, and its own."""
    planter = recall_facts.SamplePlanter(TOKENIZER, replace(CONFIG, **changes), seed)
    for epoch, begin in itertools.product(range(epochs), range(0, 8 * size if epochs == 1 else size, size)):
        sample = SPLIT.document(0)[begin : begin + size].astype(np.int64)
        before = sample.copy()
        tokens, kinds = planter.plant(sample, epoch, begin)
        assert (sample == before).all()
        assert tokens.shape == kinds.shape == sample.shape
        text = tokens[kinds == recall_facts.TEXT]
        assert (text == before[: len(text)]).all()
        is_answer = kinds == recall_facts.ANSWER
        edges = np.flatnonzero(np.diff(is_answer.astype(int), prepend=0, append=0)).reshape(-1, 2)
        whole = edges[edges[:, 1] < size]  # the last one may have been cut
        yield decode(tokens), decode(sample), [(decode(tokens[:a]), decode(tokens[a:b])) for a, b in whole]


def find_statements(text: str, part: str, value: str = "", name: str = "") -> list[tuple[int, str, str]]:
    name = name or " ".join(f"(?:{'|'.join(map(re.escape, names))})" for names in FACTS[part].values())
    found = []
    for relation in FACTS["relations"]:
        prompt = re.escape(relation["prompt"]).replace(r"\{name\}", name)
        values = value or "|".join(map(re.escape, relation[part]))
        matches = re.finditer(f"({prompt})( (?:{values})\\.)", text)
        found += [(match.start(), match.group(1), match.group(2)) for match in matches]
    return sorted(found)


def test_each_fact_is_stated_twice_and_its_second_answer_marked_and_nothing_else_changes():
    total = num_twice = 0
    for text, before, answers in plant(seed=3):
        statements = find_statements(text, "train")
        assert find_statements(text, "eval") == []
        counts = Counter(statement[1:] for statement in statements)
        assert set(counts.values()) <= {1, 2}  # a second one may have been pushed out of the sample's end
        assert len({question for question, _ in counts}) == len(counts)
        rest = text
        for _, question, answer in statements:
            rest = rest.replace(f" {question}{answer}", "", 1)
        assert before.startswith(rest[: len(rest) - 60])  # a statement may be cut by the end
        twice = {one for one, count in counts.items() if count == 2}
        marked = {(question, answer) for start, answer in answers for question, _ in twice if start.endswith(question)}
        assert marked <= twice
        assert len(marked) == len(answers) >= len(twice) - 1
        total, num_twice = total + len(statements), num_twice + len(twice)
    assert total > 20
    assert num_twice > 10


@pytest.mark.parametrize("made_up", [0, 1])
def test_a_changed_fact_is_asked_for_after_both_its_statements(made_up):
    found = 0
    for *_, answers in plant(planted_tasks=("changed",), planted_distance=(2, 60), planted_made_up=made_up):
        for before, answer in answers:
            (question,) = [
                one.group()
                for relation in FACTS["relations"]
                if (one := re.search(re.escape(relation["prompt"]).replace(r"\{name\}", NAME) + "$", before))
            ]
            old, new, asked = (text.split(".")[0] + "." for text in before.split(question)[1:])
            assert old != new == answer
            assert asked == "."
            found += 1
    assert found > 10


@pytest.mark.parametrize("made_up", [0, 1])
def test_a_reworded_fact_is_stated_in_other_words_than_it_is_asked_for(made_up):
    found = 0
    for *_, answers in plant(planted_tasks=("reworded",), planted_made_up=made_up):
        for before, answer in answers:
            for relation in FACTS["relations"]:
                if asked := re.search(re.escape(relation["prompt"]).replace(r"\{name\}", f"({NAME})") + "$", before):
                    assert before.count(f"{relation['reworded'].format(name=asked[1])}{answer}") == 1
                    assert before.count(asked[0]) == 1
                    found += 1
    assert found > 10


@pytest.mark.parametrize("made_up", [0, 1])
def test_a_fact_told_backward_ends_with_its_name(made_up):
    """Before it the same fact is told forward, and only the name is marked; a sample's values are of one relation."""
    found = 0
    for *_, answers in plant(planted_backward=1.0, planted_made_up=made_up, planted_relations=1):
        values: list[str] = []
        for before, name in answers:
            if not values:
                (relation,) = [r for r in FACTS["relations"] if before.endswith(r["backward"].partition("{value}")[2])]
                start, _, end = relation["backward"].partition("{value}")
            assert before.endswith(end)
            values.append(before[before.rindex(start) + len(start) : -len(end)])
            assert f"{relation['prompt'].format(name=name.strip(' .'))} {values[-1]}." in before
        assert len(set(values)) == len(values)
        found += len(values)
    assert found > 10


def test_made_up_names_and_values_are_of_no_list():
    names, values, own = set[str](), set[str](), set[str]()
    for text, before, _ in plant(seed=1, epochs=20, planted_made_up=1):
        own |= set(re.findall(r"[A-Za-z]+", before))
        for _, question, answer in find_statements(text, "train", value="[A-Za-z]+", name=f"(?:{NAME})"):
            values.add(answer.strip(" ."))
            names |= {word for name in re.findall(NAME, question) for word in name.split()}
    listed = {value for relation in FACTS["relations"] for value in relation["train"] + relation["eval"]}
    people = {name for part in ("train", "eval") for names_of in FACTS[part].values() for name in names_of}
    assert len(names) > 20
    assert not names & people
    assert len(values) > 20
    assert len(values & listed) <= 1
    assert 0.2 < len(values & own) / len(values) < 0.8  # words of the text, and made-up ones


def test_the_distances_are_those_asked_for():
    distances = []
    for text, *_ in plant(size=3000, epochs=10, planted_facts=2, planted_distance=(200, 400)):
        places: dict[str, list[int]] = {}
        for place, question, _ in find_statements(text, "train"):
            places.setdefault(question, []).append(len(TOKENIZER.encode(text[:place]).ids))
        distances += [found[1] - found[0] for found in places.values() if len(found) == 2]
    assert len(distances) > 10
    assert min(distances) >= 100
    assert max(distances) <= 800


def test_a_plan_plants_and_weighs_but_not_in_pinned_documents():
    pinned = replace(SPLIT, num_pinned_documents=1)
    options = {"seq_length": 256, "batch_size": 3, "order": "shuffled", "seed": 0, "epoch": 2}
    planter = recall_facts.SamplePlanter(TOKENIZER, CONFIG, seed=0)
    plain = plan_batches(pinned, **options)
    plan = plan_batches(pinned, **options, planter=planter, planted_weights=(0.5, 7.0))
    assert len(plan) == len(plain)
    for index, (before, after) in enumerate(zip(plain, plan, strict=True)):
        assert before.label_weights is None
        assert before.num_targets == after.num_targets
        weights = after.label_weights
        assert weights.shape == after.labels.shape
        assert set(weights.unique().tolist()) <= {0.5, 1.0, 7.0}
        assert (after.labels[:, :-1] == after.input_ids).all() or before.attention_mask is not None
        assert ((before.labels == -100) == (after.labels == -100)).all()
        for row, sample in enumerate(plan.rows[index][plan.rows[index] >= 0]):
            begin = plan.starts[sample]
            if begin < pinned.offsets[1]:
                assert (before.labels[row] == after.labels[row]).all()
                assert (weights[row] == 1).all()
            else:
                _, kinds = planter.plant(pinned.tokens[begin : begin + 257].astype(np.int64), 2, int(begin))
                if (before.labels[row] != -100).all():
                    assert (weights[row].numpy() == np.array([1, 0.5, 7])[kinds]).all()
    assert sum(int((batch.label_weights == 7).sum()) for batch in plan) > 20
    halves = [plan.take_rows(slice(0, 2))[0], plan.take_rows(slice(2, 3))[0]]
    assert (plan[0].input_ids == np.concatenate([half.input_ids for half in halves])).all()


SMALL = train_tokenizer([TEXT], 330)
TOKENS = np.array(SMALL.encode(TEXT * 4).ids)
BORDERS = recall_facts.SentenceBorders(SMALL)


@pytest.mark.parametrize("task", ["passkey", "facts", "changed", "reworded"])
@pytest.mark.parametrize("part", ["train", "eval"])
def test_a_needle_is_a_question_with_its_answer(task, part):
    for trial in range(40):
        needle = recall_facts.draw_needle(task, part, 10, np.random.default_rng(trial))
        assert needle.statement.startswith(needle.opening + needle.candidates[0])
        assert (needle.opening != needle.prompt) == (task == "reworded")
        assert needle.replaced == (needle.prompt + needle.candidates[1] if task == "changed" else "")
        assert len(set(needle.candidates)) == 10
        assert all(candidate[0] == " " and candidate[-1] == "." for candidate in needle.candidates)
        assert needle.prompt == needle.prompt.strip()
        assert needle == recall_facts.draw_needle(task, part, 10, np.random.default_rng(trial))


def test_train_and_eval_share_no_name_value_or_key():
    parts = {part: recall_facts._read_facts(part) for part in ("train", "eval")}
    for names in ("first_names", "surnames"):
        assert not set(parts["train"][0][names]) & set(parts["eval"][0][names])
    for relation in parts["eval"][1]:
        assert not set(relation["train"]) & set(relation["eval"])
        assert len(set(relation["train"])) == len(set(relation["eval"])) == MAX_CANDIDATES
    keys = {part: set() for part in parts}
    for part, found in keys.items():
        for trial in range(300):
            needle = recall_facts.draw_needle("passkey", part, 10, np.random.default_rng(trial))
            found.update(int(answer.strip(" .")) for answer in needle.candidates)
    assert not keys["train"] & keys["eval"]
    assert all(
        recall_facts.is_key_of(key, "train") != recall_facts.is_key_of(key, "eval") for key in range(10_000, 10_200)
    )
    assert np.mean([recall_facts.is_key_of(key, "eval") for key in range(10_000, 20_000)]) == pytest.approx(
        0.2, abs=0.02
    )


@pytest.mark.parametrize("one_relation", [True, False])
def test_facts_in_both_directions_share_no_name(one_relation):
    pairs = recall_facts.draw_pairs_of_facts("eval", 50, 4, seed=0, one_relation=one_relation)
    assert len({pair.subject for pair in pairs}) == len(pairs) == 200
    for begin in range(0, 200, 4):
        text = pairs[begin : begin + 4]
        assert len({pair.object for pair in text}) == 4
        assert len({pair.forward_prompt.replace(pair.subject, "") for pair in text}) == (1 if one_relation else 4)
        for pair in text:
            assert pair.forward == pair.forward_prompt + f" {pair.object}."
            assert pair.backward == pair.backward_prompt + f" {pair.subject}."


@pytest.mark.parametrize("segment_length", [40, 64])
@pytest.mark.parametrize("depth", [0, 0.3, 0.5, 1])
def test_a_sentence_is_put_near_its_depth_and_not_across_segments(segment_length, depth):
    length = 17
    place = recall_facts.choose_place(TOKENS, length, depth, segment_length, BORDERS)
    assert abs(place - depth * len(TOKENS)) <= segment_length / 2
    assert place // segment_length == (place + length - 1) // segment_length
    assert place == 0 or place in BORDERS.find_words(TOKENS)


@pytest.mark.parametrize("family", ["gpt-neox", "llama"])
def test_facts_are_planted_between_words_by_tokenizers_of_other_families(family):
    """Llama's decoder drops the space before a text's first word, and its tokenizer marks one there."""
    tokenizer = train_family(family)
    planter = recall_facts.SamplePlanter(tokenizer, replace(CONFIG, planted_facts=40), seed=0)
    sample = np.array(tokenizer.encode(TEXT * 4, add_special_tokens=False).ids)
    text = tokenizer.decode(planter.plant(sample, 0, 0)[0].tolist())
    statements = find_statements(text, "train")
    assert len(statements) >= 4
    assert "  " not in text
    assert all(text[begin - 1] == " " for begin, *_ in statements)
    for _, question, answer in statements:
        text = text.replace(f" {question}{answer}", "", 1)
    assert tokenizer.decode(sample.tolist()).startswith(text[:100])


@pytest.mark.parametrize(
    ("made_up", "words", "message"),
    [
        (0, ["a", "b"], "planted_facts: the tokenizer has no entry that ends a sentence"),
        (1, ["a", ".", " "], "planted_made_up: the tokenizer has no entry that begins a word"),
    ],
)
def test_a_tokenizer_that_facts_cannot_be_made_of_is_refused(made_up, words, message):
    tokenizer = Tokenizer(WordLevel({word: token for token, word in enumerate(words)}, unk_token="a"))
    tokenizer.decoder = Fuse()
    with pytest.raises(UserError, match=message):
        recall_facts.SamplePlanter(tokenizer, replace(CONFIG, planted_made_up=made_up), seed=0)
