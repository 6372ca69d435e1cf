"""Models larger than the machine are rejected in one line, before anything is allocated or drawn."""

import json
import resource

import pytest
import torch

from new_llm.config import PythiaConfig, UserError
from new_llm.config.loading import read_settings
from new_llm.experiments.config import ExperimentConfig
from new_llm.experiments.runner import ExperimentRun
from new_llm.models import create_model
from new_llm.models.cost import read_memory_limit
from new_llm.models.hf import load_pythia
from new_llm.models.model_file import build_model, describe_model

TINY = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 2048,
}
OUT_OF_RANGE = "less than or equal to|at most"
SIZES = {
    "wide": ({"hidden_size": 10**9}, OUT_OF_RANGE),
    "wide, as many heads": ({"hidden_size": 10**9, "num_attention_heads": 10**9}, OUT_OF_RANGE),
    "wide but in range": ({"hidden_size": 1 << 24}, "too large"),
    "a wide MLP": ({"intermediate_size": 1 << 24, "hidden_size": 1 << 14}, "too large"),
    "deep": ({"num_hidden_layers": 2000}, OUT_OF_RANGE),
    "deep and wide": ({"num_hidden_layers": 64, "hidden_size": 1 << 14}, "too large"),
    "a vocabulary": ({"vocab_size": 10**30}, OUT_OF_RANGE),
    "a vocabulary in range": ({"vocab_size": 1 << 24, "hidden_size": 1 << 14}, "too large"),
    "positions": ({"max_position_embeddings": 10**12}, OUT_OF_RANGE),
    "memories": ({"num_memory_banks": 10**9}, OUT_OF_RANGE),
    "memories in range": ({"num_memory_banks": 1 << 24, "hidden_size": 1 << 8}, "too large"),
}


def build_by_create_model(values, tmp_path):
    options = {name: values.pop(name) for name in ("num_memory_banks",) if name in values}
    create_model("infini", PythiaConfig(**values), **options)


def check_experiment(values, tmp_path):
    (tmp_path / "config.yaml").write_text(json.dumps({"models": ["infini"], "model": values}))
    ExperimentRun(read_settings(tmp_path / "config.yaml", ExperimentConfig)).check()


def build_from_structure(values, tmp_path):
    structure = describe_model(create_model("infini", PythiaConfig(**TINY)))
    names = {"num_attention_heads": "num_heads"}
    entry = structure["layers"][0]
    entry |= {names.get(name, name): value for name, value in values.items() if names.get(name, name) in entry}
    structure["layers"] = [entry] * values["num_hidden_layers"]
    structure["vocab_size"], structure["segment_length"] = values["vocab_size"], values["max_position_embeddings"]
    build_model(structure, "model.json")


def load_from_folder(values, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_neox", **values}))
    load_pythia(tmp_path)


@pytest.mark.parametrize("build", [build_by_create_model, check_experiment, build_from_structure, load_from_folder])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_a_model_too_large_is_rejected_before_it_is_allocated(sizes, build, tmp_path):
    values, message = sizes
    if build is load_from_folder and (message != OUT_OF_RANGE or "num_memory_banks" in values):
        pytest.skip("a folder's weights bound its shapes; GPT-NeoX has no memory")
    before = torch.get_rng_state()
    with pytest.raises(UserError, match=message) as caught:
        build(TINY | values, tmp_path)
    assert "\n" not in str(caught.value)
    if build is not build_from_structure:  # which makes a tiny model first
        assert torch.equal(torch.get_rng_state(), before)


def test_a_limit_of_the_process_counts(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1 << 20, resource.RLIM_INFINITY))
    assert read_memory_limit() == 1 << 20
