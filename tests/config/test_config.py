"""Configurations from YAML and from keywords, and objects of a user's own module by name."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from new_llm.config import PythiaConfig, UserError
from new_llm.config.loading import find_committed, load_by_name, read_settings, settings_from_dict
from new_llm.experiments.config import ExperimentConfig
from new_llm.models import ModelType
from tiny import refused

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize(("given", "limits"), [({}, (16, 4096)), ({"max_documents": None}, (None, 4096))])
def test_what_a_file_leaves_out_of_long_documents_keeps_the_experiment_s_limits(tmp_path, given, limits):
    (path := tmp_path / "config.yaml").write_text(
        yaml.safe_dump({"eval": {"long_documents": {"edges": [0, 64]} | given}}), encoding="utf-8"
    )
    for config in (read_settings(path, ExperimentConfig), ExperimentConfig(**yaml.safe_load(path.read_text()))):
        found = config.eval.long_documents
        assert (found.edges, found.max_documents, found.max_tokens_per_document) == ((0, 64), *limits)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_published_configuration_loads_and_survives_its_yaml_form(path):
    config = read_settings(path, ExperimentConfig)
    assert settings_from_dict(yaml.safe_load(config.to_yaml()), ExperimentConfig, "again") == config


def test_the_reference_file_is_the_programs_default():
    reference = read_settings(find_committed(Path("pythia-70m-pile"), "configs"), ExperimentConfig)
    default = ExperimentConfig(models=reference.models)
    assert reference.model.shape(1) == dataclasses.replace(default.model.shape(1), vocab_size=50304)
    assert dataclasses.replace(reference, model=default.model) == default
    assert reference.data.source == "pile"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("data: {sourc: x}", "data.sourc"),
        ("train: {num_epochs: 0}", "train.num_epochs"),
        ("train: {compile: 'yes'}", "train.compile"),
        ("train: {learning_rate: .nan}", "train.learning_rate"),
        ("train: {learning_rate: -1e-4}", "train.learning_rate"),
        ("seed: true", "seed"),
        ("models: []", "models"),
        ("models: [pythia, pythia]", "models"),
        ("models: [pythia, gpt]", "models"),
        ("models: [gpt]", "or my_module:MyLayer"),
        ("model: {hidden_size: 100, num_attention_heads: 7}", "hidden_size"),
        ("data: {seq_length: 100, segments_per_sample: 7}", "data.seq_length"),
        ("data: {planted_distance: [100, 10]}", "data.planted_distance"),
        ("data: {planted_facts: -1}", "data.planted_facts"),
        ("data: {planted_facts: 1}", "data.planted_facts needs data.order: shuffled; order is stream"),
        ("data: {order: shuffled, segment_curriculum: [3]}", "3 does not divide data.segments_per_sample (4)"),
        ("data: {segment_curriculum: [2]}", "data.segment_curriculum ([2]) needs data.order: shuffled"),
        ("data: {mixed_samples: 0.5}", "data.mixed_samples (0.5) needs data.order: shuffled"),
        ("data: {order: shuffled, mixed_samples: 0.5, segment_curriculum: [1]}", "and no data.segment_curriculum"),
        ("data: [1, 2]", "data"),
        ("[1, 2]", "mapping"),
        ("a: b: c", "YAML"),
        ("models: !!python/object/apply:os.system ['touch ran']", "could not determine a constructor"),
        ("a: &a [x]\nb: [*a, *a]\n", "aliases are not allowed"),
    ],
)
def test_bad_yaml_is_one_line_that_names_the_fault(tmp_path, text, named):
    (path := tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    with refused(re.escape(named)):
        read_settings(path, ExperimentConfig)


def test_flat_keywords_land_in_their_sections_and_segment_and_vocabulary_are_the_data_s_unless_set():
    config = ExperimentConfig(data={"source": "sotu"}, num_samples=7, num_epochs=30, num_memories=8)
    assert (config.data.source, config.data.num_samples) == ("sotu", 7)
    assert (config.train.num_epochs, config.model.num_memories) == (30, 8)
    assert ExperimentConfig(seq_length=256, segments_per_sample=4).segment_length == 64
    assert ExperimentConfig(seq_length=256, segment_length=32).segment_length == 32
    for bad, message in (({"seq_length": 4096, "segments_per_sample": 1}, "max_position_embeddings"), ({"a": 1}, "a")):
        with refused(message):
            ExperimentConfig(**bad)
    config = ExperimentConfig()
    assert config.model.shape(4096) == PythiaConfig(vocab_size=4096)
    assert ExperimentConfig(vocab_size=50304).model.shape(4096).vocab_size == 50304
    assert set(config.model.options_of(ModelType.MULTI_MEMORY)) >= {"num_memories", "use_delta_rule"}


def test_the_current_directory_is_searched_last(own_folder):
    (own_folder / "own_measures.py").write_text("VALUE = 7")
    (own_folder / "json.py").write_text("VALUE = 7")
    assert load_by_name("own_measures:VALUE") == 7
    (own_folder / "own_package").mkdir()
    (own_folder / "own_package" / "deep.py").write_text("VALUE = 8")
    assert load_by_name("own_package.deep:VALUE") == 8
    with pytest.raises(UserError, match=r"json:VALUE: .*json/__init__\.py defines no VALUE"):
        load_by_name("json:VALUE")


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        ("", "absent_module:Layer", "no module named absent_module, neither installed nor in "),
        ("", "own_module:Layer", r"own_module\.py defines no Layer"),
        ("import absent_module", "own_module:Layer", "importing own_module failed: No module named 'absent_module'"),
        ("1 / 0", "own_module:Layer", "importing own_module failed: ZeroDivisionError: division by zero"),
        ("", "own_module", "a layer of your own is named my_module:MyName"),
        ("", "own_module:", "a layer of your own is named my_module:MyName"),
    ],
)
def test_what_can_not_be_loaded_is_one_line(own_folder, source, name, message):
    (own_folder / "own_module.py").write_text(source)
    with refused(message):
        load_by_name(name, "a layer")
