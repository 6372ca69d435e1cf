"""Tokenizers: loaded from a file or the hub, or a byte-level BPE trained on the training split."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from new_llm.config import DataConfig, UserError
from new_llm.config.files import read_text_file
from new_llm.data.hub import describe_failure, hub_answers, hub_endpoint

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"
MAX_TOKENIZER_BYTES = 1 << 28  # those of the largest vocabularies have some tens of megabytes
VOCAB_MULTIPLE = 128  # rows of the embedding; 50,277 entries become Pythia's 50,304 rows


def find_tokenizer(config: DataConfig, *, is_hub_source: bool) -> tuple[str, Tokenizer] | None:
    """The name and the tokenizer that the configuration asks for; None: one must be trained.

    Raises:
        UserError: see `get_tokenizer`.
    """
    if config.tokenizer != "auto":
        return config.tokenizer, get_tokenizer(config.tokenizer, config.hub_timeout_seconds)
    if is_hub_source:
        try:
            return config.hub_tokenizer, get_tokenizer(config.hub_tokenizer, config.hub_timeout_seconds)
        except UserError:
            return None
    return None


def get_tokenizer(name_or_file: str | Path, hub_timeout_seconds: float = 5.0) -> Tokenizer:
    """Load a tokenizer: a tokenizer.json, a folder that holds one, or a name on the hub or in the hub's cache here.

    Args:
        name_or_file: "EleutherAI/pythia-70m", "my_tokenizer.json" or "runs/mine".
        hub_timeout_seconds: how long to wait for the hub before it counts as out of reach.

    Raises:
        UserError: the file is missing or not a tokenizer, or the hub is out of reach and has not been cached.
    """
    name = str(name_or_file)
    path = Path(name).expanduser()
    if path.is_dir():
        path /= TOKENIZER_FILE
    if path.is_file():
        return read_tokenizer_file(path)
    if path.suffix == ".json" or path.is_absolute() or path.name == TOKENIZER_FILE or name.startswith((".", "~")):
        raise UserError(
            f"{path}: no such tokenizer file; a tokenizer is a tokenizer.json, a folder that holds one, or a hub name"
        )
    import huggingface_hub

    try:
        if hub_answers(f"{name}/resolve/main/{TOKENIZER_FILE}", hub_timeout_seconds):
            return _as_plain(Tokenizer.from_pretrained(name))
        cached = huggingface_hub.try_to_load_from_cache(name, TOKENIZER_FILE)
    except Exception as error:  # tokenizers raises plain Exception
        raise UserError(f"tokenizer {name!r} could not be loaded: {describe_failure(error)}") from None
    if isinstance(cached, str):
        return read_tokenizer_file(Path(cached))
    raise UserError(
        f"tokenizer {name!r} is not a file, is not cached here, and the hub at {hub_endpoint()} is out of reach; "
        f"use a tokenizer.json, or data.tokenizer: auto, which trains one"
    )


def read_tokenizer_file(path: Path) -> Tokenizer:
    """Read a tokenizer.json.

    Raises:
        UserError: it can't be read or is not a tokenizer.
    """
    try:
        text = read_text_file(path, MAX_TOKENIZER_BYTES)
    except FileNotFoundError:
        raise UserError(f"{path}: no such tokenizer file") from None
    try:
        return _as_plain(Tokenizer.from_str(text))
    except Exception as error:  # tokenizers raises plain Exception
        raise UserError(f"{path}: not a valid tokenizer file: {describe_failure(error)}") from None


def _as_plain(tokenizer: Tokenizer) -> Tokenizer:
    # A file may ask to cut or pad; documents are tokenised whole.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE, lossless for any text, with `<|endoftext|>` as id 0.

    The same texts give the same tokenizer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def fingerprint_tokenizer(tokenizer: Tokenizer) -> str:
    """Sha256 of the tokenizer's JSON."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def padded_vocab_size(tokenizer: Tokenizer) -> int:
    """Rows of an embedding for this tokenizer: one above its largest id, rounded up to a multiple of 128."""
    size = max(tokenizer.get_vocab().values()) + 1
    return -(-size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
