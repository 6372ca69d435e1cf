"""Facts planted in training documents: stated twice, at the distances asked for, from the training part alone."""

import json
import re
from importlib import resources

import numpy as np
import pytest

from new_llm.config import DataConfig, UserError
from new_llm.data.dataset import prepare_data
from new_llm.data.planted_facts import plant_facts
from new_llm.data.tokenizer import train_tokenizer
from new_llm.data.tokens import count_words, encode_documents

FACTS = json.loads(resources.files("new_llm.data").joinpath("recall_facts.json").read_text())


@pytest.fixture(scope="module")
def tokenizer(speeches):
    return train_tokenizer(speeches, 512)


def find_statements(text: str, part: str) -> list[tuple[int, str]]:
    names = "|".join(map(re.escape, FACTS[part]["first_names"]))
    surnames = "|".join(map(re.escape, FACTS[part]["surnames"]))
    found = []
    for relation in FACTS["relations"]:
        prompt = re.escape(relation["prompt"]).replace(r"\{name\}", f"(?:{names}) (?:{surnames})")
        values = "|".join(map(re.escape, relation[part]))
        found += [(match.start(), match.group()) for match in re.finditer(f"{prompt} (?:{values})\\.", text)]
    return sorted(found)


def test_each_fact_is_stated_twice_and_nothing_else_changes(speeches, tokenizer):
    config = DataConfig(planted_facts=10, planted_distance=(20, 60))
    before = list(encode_documents(speeches, tokenizer))
    after = list(plant_facts(before, tokenizer, config, seed=3))
    assert len(after) == len(before)
    total = 0
    for old, new in zip(before, after, strict=True):
        text = tokenizer.decode(new.ids.tolist(), skip_special_tokens=False)
        statements = find_statements(text, "train")
        assert find_statements(text, "eval") == []
        counts = np.unique([statement for _, statement in statements], return_counts=True)[1]
        assert (counts % 2 == 0).all()
        rest = text
        for _, statement in statements:
            rest = rest.replace(f" {statement}", "", 1)
        assert rest == tokenizer.decode(old.ids.tolist(), skip_special_tokens=False)
        assert new.num_bytes == len(text.encode())
        assert new.num_words == count_words(rest) + sum(count_words(statement) for _, statement in statements)
        total += len(statements)
    assert total >= 2 * len(speeches)


def test_the_distances_are_those_asked_for(speeches, tokenizer):
    long = [" ".join(speeches)]
    document = next(iter(encode_documents(long, tokenizer)))
    config = DataConfig(planted_facts=2, planted_distance=(200, 400))
    (planted,) = plant_facts([document], tokenizer, config, seed=0)
    text = tokenizer.decode(planted.ids.tolist(), skip_special_tokens=False)
    places: dict[str, list[int]] = {}
    for place, statement in find_statements(text, "train"):
        places.setdefault(statement, []).append(len(tokenizer.encode(text[:place]).ids))
    pairs = [found for found in places.values() if len(found) == 2]
    assert len(pairs) > 5
    for first, second in pairs:
        assert 100 <= second - first <= 800  # borders of sentences, and other facts between


def test_a_document_s_facts_depend_on_seed_and_place_alone(speeches, tokenizer):
    config = DataConfig(planted_facts=5)
    documents = list(encode_documents(speeches, tokenizer))

    def plant(documents, seed):
        return [planted.ids.tolist() for planted in plant_facts(documents, tokenizer, config, seed)]

    assert plant(documents, 1) == plant(documents, 1)
    assert plant(documents[:3], 1) == plant(documents, 1)[:3]
    assert plant(documents, 1) != plant(documents, 2)
    without = DataConfig(planted_facts=0)
    assert [p.ids.tolist() for p in plant_facts(documents, tokenizer, without, 1)] == [
        document.ids.tolist() for document in documents
    ]


def test_only_training_documents_are_planted(tmp_path):
    settings = {"source": "sotu", "max_documents": 20, "tokenizer_vocab_size": 512, "cache_dir": tmp_path}
    settings |= {"num_samples": None, "seq_length": 64}
    plain = prepare_data(DataConfig(**settings), seed=0)
    planted = prepare_data(DataConfig(**settings, planted_facts=5), seed=0)
    assert planted.train.num_tokens > plain.train.num_tokens
    assert (planted.validation.tokens == plain.validation.tokens).all()
    pinned = plain.train.offsets[plain.train.num_pinned_documents]
    assert pinned > 0
    assert (planted.train.tokens[:pinned] == plain.train.tokens[:pinned]).all()


def test_bad_settings_are_refused():
    with pytest.raises(UserError, match="planted_distance"):
        DataConfig(planted_distance=(100, 10))
    with pytest.raises(UserError, match="planted_facts"):
        DataConfig(planted_facts=-1)
