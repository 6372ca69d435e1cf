"""Model folders in `transformers`' layout: written whole, with the tokenizer."""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from new_llm.config import UserError
from new_llm.config.files import make_temporary_folder, write_atomically
from new_llm.data.tokenizer import END_OF_TEXT
from new_llm.models.hf.checkpoint import CONFIG_FILE
from new_llm.models.tensor_files import raise_os_errors

PADDING = "<|padding|>"
"""Pythia's padding token; a tokenizer without it pads with its end of text."""
WEIGHT_PATTERNS = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
)
TOKENIZER_CLASS = "PreTrainedTokenizerFast"
"""The name under which old and new versions of `transformers` know a tokenizer.json."""


@contextmanager
def stage_folder(directory: Path) -> Iterator[Path]:
    """A temporary folder; at the block's end its files take their places in `directory`, the configuration last.

    Weights of an earlier model that stood there are removed, as no reader could tell them from the new ones; all other
    files stay. An error inside the block leaves `directory` as it was.

    Raises:
        UserError: the folder can't be made.
    """
    with ExitStack() as stack:
        try:
            staging = stack.enter_context(make_temporary_folder(directory / "model"))
        except OSError as error:
            raise UserError(f"{directory}: can't write a model here: {error.strerror}") from None
        stack.enter_context(raise_os_errors(directory))
        yield staging
        files = sorted(staging.iterdir(), key=lambda file: file.name == CONFIG_FILE)
        for stale in {path for pattern in WEIGHT_PATTERNS for path in directory.glob(pattern)}:
            if stale.name not in {file.name for file in files}:
                stale.unlink()
        for file in files:
            with write_atomically(directory / file.name) as temporary:
                os.replace(file, temporary)


def wrap_tokenizer(tokenizer: Tokenizer | PreTrainedTokenizerBase, max_length: int) -> PreTrainedTokenizerBase:
    """A tokenizer as `transformers` wants it: with its special tokens, padding on the left as generation needs it."""
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    special: dict[str, Any] = {}
    if tokenizer.token_to_id(END_OF_TEXT) is not None:
        special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    if tokenizer.token_to_id(PADDING) is not None:
        special["pad_token"] = PADDING
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **special,
    )


def find_token_ids(tokenizer: PreTrainedTokenizerBase | None) -> dict[str, int | None]:
    """bos_token_id, eos_token_id, pad_token_id; without a tokenizer 0, `<|endoftext|>` of Pythia and of ours."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: 0 if tokenizer is None else getattr(tokenizer, name) for name in names}


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer's files, under a class name that every version of `transformers` knows."""
    tokenizer.save_pretrained(str(folder))
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    if type(tokenizer) is PreTrainedTokenizerFast:
        settings["tokenizer_class"] = TOKENIZER_CLASS
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_generation_config(token_ids: dict[str, int | None], folder: Path) -> None:
    """Write `generation_config.json`: greedy, with the special tokens."""
    GenerationConfig(**token_ids).save_pretrained(str(folder))
