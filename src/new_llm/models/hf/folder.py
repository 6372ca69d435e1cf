"""Model folders in the layout of `transformers`: finding them on disk or on the hub, reading and writing them."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from new_llm.config import DataConfig, UserError
from new_llm.config.files import make_temporary_folder, read_mapping, shorten, write_atomically
from new_llm.data.hub import describe_failure, hub_answers, hub_endpoint
from new_llm.data.tokenizer import END_OF_TEXT, find_special_tokens
from new_llm.models.model_file import STRUCTURE_FILE
from new_llm.models.tensor_files import read_safetensors, read_torch_file

CONFIG_FILE = "config.json"
INDEX_ENDING = ".index.json"
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Files that may hold the weights; the first that exists is used. An index lists the files of a sharded checkpoint."""
INSTEAD = (
    "give a directory written by save_pretrained or export_pythia; `new-llm export --format gpt_neox` makes one from "
    "a run"
)


def find_checkpoint(name_or_directory: str | Path, revision: str | None = None) -> Path:
    """The local directory of a checkpoint: the one given, or that of a hub repository, downloaded if necessary.

    Raises:
        UserError: there is no such directory or repository, or the hub is out of reach and nothing is cached.
    """
    name = str(name_or_directory)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if isinstance(name_or_directory, Path) or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"{name}: no such directory; {INSTEAD}, or give a hub name such as EleutherAI/pythia-70m")
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    reachable = hub_answers(f"{name}/resolve/{revision or 'main'}/{CONFIG_FILE}", DataConfig.hub_timeout_seconds)
    try:
        if reachable:
            info = huggingface_hub.HfApi(endpoint=hub_endpoint()).model_info(name, revision=revision)
            there = {sibling.rfilename for sibling in info.siblings or []}
            wanted = [CONFIG_FILE, *[file for file in WEIGHT_FILES if file in there][:1]]  # only one set of weights
            if wanted[-1].endswith(INDEX_ENDING):
                stem, ending = wanted[-1].removesuffix(INDEX_ENDING).rsplit(".", 1)
                wanted.append(f"{stem}-*.{ending}")
            return Path(
                huggingface_hub.snapshot_download(
                    name, revision=revision, allow_patterns=wanted, endpoint=hub_endpoint()
                )
            )
        cached = huggingface_hub.try_to_load_from_cache(name, CONFIG_FILE, revision=revision)
    except HFValidationError as error:
        raise UserError(f"{name}: neither a directory nor a hub name: {describe_failure(error)}") from None
    except Exception as error:  # huggingface_hub raises whatever its transport raises
        raise UserError(f"{name} could not be loaded: {describe_failure(error)}; {INSTEAD}") from None
    if not isinstance(cached, str):
        raise UserError(
            f"{name} is not a directory, is not cached here, and the hub at {hub_endpoint()} is out of reach; {INSTEAD}"
        )
    return Path(cached).parent


def read_config(folder: Path) -> dict[str, Any]:
    """The checkpoint's `config.json`."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        hint = " (it holds a model written by save_model: use load_model)"
        raise UserError(
            f"{folder}: no {CONFIG_FILE} here{hint if (folder / STRUCTURE_FILE).is_file() else ''}; {INSTEAD}"
        )
    return read_mapping(path)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint by name, on the CPU, in their stored dtypes. No pickled code is run."""
    name = next((name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if name is None:
        raise UserError(f"{folder}: no weights here; looked for {', '.join(WEIGHT_FILES)}")
    if not name.endswith(INDEX_ENDING):
        return _read_tensors(folder / name)
    places = read_mapping(folder / name).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise UserError(f"{folder / name}: no weight_map of names and files")
    weights: dict[str, Tensor] = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file:
            raise UserError(shorten(f"{folder / name}: {file!r} is not a file in this folder"))
        weights |= _read_tensors(folder / file)
    if missing := sorted(set(places) - set(weights)):
        raise UserError(shorten(f"{folder / name}: the files lack {', '.join(missing[:5])}"))
    return weights


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    values = read_torch_file(path)
    if not isinstance(values, dict) or not all(isinstance(value, Tensor) for value in values.values()):
        raise UserError(f"{path}: not a mapping of names and tensors")
    return values


# Writing


WEIGHT_PATTERNS = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
)
TOKENIZER_CLASS = "PreTrainedTokenizerFast"
"""The class that both old and new versions of `transformers` use for a tokenizer.json."""


@contextmanager
def stage_folder(
    directory: str | Path, tokenizer: Tokenizer | PreTrainedTokenizerBase | None, *, max_length: int, vocab_size: int
) -> Iterator[tuple[Path, dict[str, int | None]]]:
    """A temporary folder to write a model to, and the ids of the tokenizer's special tokens by name.

    At the block's end the tokenizer is added, and the files are moved to `directory`, the configuration last. Weight
    files of an earlier model in `directory` are deleted, since readers might take them for the new model's; other files
    stay. An error inside the block leaves `directory` unchanged.

    Args:
        directory: where to write.
        tokenizer: see `wrap_tokenizer`; None: no tokenizer is written, and token 0 ends a text.
        max_length: maximum number of tokens in a text.
        vocab_size: number of rows of the model's embedding.

    Raises:
        OSError: the folder can't be written.
    """
    directory, wrapped = Path(directory).expanduser(), wrap_tokenizer(tokenizer, max_length, vocab_size)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    # token 0 is `<|endoftext|>` in Pythia's tokenizer and in New-LLM's
    token_ids: dict[str, int | None] = {name: 0 if wrapped is None else getattr(wrapped, name) for name in names}
    with make_temporary_folder(directory / CONFIG_FILE) as staging:
        yield staging, token_ids
        if wrapped is not None:
            wrapped.save_pretrained(str(staging))
        if type(wrapped) is PreTrainedTokenizerFast:
            path = staging / "tokenizer_config.json"
            settings = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": TOKENIZER_CLASS}
            path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        files = sorted(staging.iterdir(), key=lambda file: file.name == CONFIG_FILE)
        for stale in {path for pattern in WEIGHT_PATTERNS for path in directory.glob(pattern)}:
            if stale.name not in {file.name for file in files}:
                stale.unlink()
        for file in files:
            with write_atomically(directory / file.name) as temporary:
                os.replace(file, temporary)


def wrap_tokenizer(
    tokenizer: Tokenizer | PreTrainedTokenizerBase | None, max_length: int, vocab_size: int
) -> PreTrainedTokenizerBase | None:
    """A tokenizer for `transformers`, with its special tokens, and padding on the left, as generation needs it.

    It encodes text as in training, without adding special tokens. If it has no end-of-text token, `<|endoftext|>` is
    added with an unused id of the model, because generation and evaluation need it.

    Args:
        tokenizer: a `transformers` tokenizer is returned unchanged; so is None.
        max_length: maximum number of tokens in a text.
        vocab_size: number of rows of the model's embedding.
    """
    if tokenizer is None or isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    plain = Tokenizer.from_str(tokenizer.to_str())
    if plain.num_special_tokens_to_add(is_pair=False):
        plain.post_processor = None
    if "eos_token" not in find_special_tokens(plain) and max(plain.get_vocab().values()) + 1 < vocab_size:
        plain.add_special_tokens([END_OF_TEXT])
    return PreTrainedTokenizerFast(
        tokenizer_object=plain,
        model_max_length=max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **find_special_tokens(plain),
    )
