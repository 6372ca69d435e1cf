"""Finding the model and the tokenizer of a run."""

from pathlib import Path

from tokenizers import Tokenizer

from new_llm.config import UserError
from new_llm.data.tokenizer import TOKENIZER_FILE, read_tokenizer_file
from new_llm.experiments.record import name_model_folder
from new_llm.models import TransformerLM
from new_llm.models.layers import LAYER_KINDS, MemoryLayer
from new_llm.models.model_file import STRUCTURE_FILE, load_model, read_structure
from new_llm.training.checkpoint import BEST_FOLDER

TOKENIZER_LEVELS = 3
"""A model's tokenizer is in its folder or at most two above: runs/<name>/<model>/best."""


def find_model_folder(run: Path, model: str | None = None, *, needs_memory: bool = False) -> Path:
    """The folder of one saved model.

    Args:
        run: a run folder with `<model>/best` folders, one such `<model>` folder, or a model's own folder.
        model: which model of a run folder; None: the only one.
        needs_memory: leave out models without memory layers.

    Raises:
        UserError: there is no model, not the one asked for, or several to choose from.
    """
    if not run.is_dir():
        raise UserError(f"{run}: no such folder; a run folder or a folder with {STRUCTURE_FILE} is expected")
    for folder in (run, run / BEST_FOLDER):
        if (folder / STRUCTURE_FILE).is_file():
            if model is not None:
                raise UserError(f"{run}: holds one model; a model's name ({model!r}) can't be asked for")
            if needs_memory and not has_memory(folder):
                raise UserError(f"{run}: this model has no memory layer")
            return folder
    found = sorted(run.glob(f"*/{BEST_FOLDER}/{STRUCTURE_FILE}"))
    folders = {path.parent.parent.name: path.parent for path in found}
    if not folders:
        raise UserError(
            f"{run}: no saved model here: no {STRUCTURE_FILE} and no <model>/{BEST_FOLDER}/{STRUCTURE_FILE}"
        )
    names = ", ".join(folders)
    if model is not None:
        folder = folders.get(model) or folders.get(name_model_folder(model))
        if folder is None:
            raise UserError(f"{run}: no model {model!r} here; it has {names}")
        if needs_memory and not has_memory(folder):
            raise UserError(f"{run}: the model {model} has no memory layer")
        return folder
    if needs_memory:
        folders = {name: folder for name, folder in folders.items() if has_memory(folder)}
        if not folders:
            raise UserError(f"{run}: none of its models has a memory layer ({names})")
    if len(folders) > 1:
        raise UserError(f"{run}: several models; choose one by --model: {', '.join(folders)}")
    return next(iter(folders.values()))


def has_memory(folder: Path) -> bool:
    """Whether a saved model has a memory layer, by its structure alone.

    Raises:
        UserError: the structure can't be read.
    """
    structure = read_structure(folder)
    layers = structure.get("layers") if isinstance(structure, dict) else None
    if not isinstance(layers, list):
        raise UserError(f"{folder / STRUCTURE_FILE}: not a model description")
    kinds = (LAYER_KINDS.get(str(layer.get("kind"))) for layer in layers if isinstance(layer, dict))
    return any(kind is not None and issubclass(kind, MemoryLayer) for kind in kinds)


def load_run_model(
    run: Path, model: str | None = None, *, needs_memory: bool = False
) -> tuple[TransformerLM, Tokenizer]:
    """A run's model with its best weights, and its tokenizer; arguments as in `find_model_folder`.

    Raises:
        UserError: the model or the tokenizer is missing or broken, or they do not fit each other.
    """
    folder = find_model_folder(run, model, needs_memory=needs_memory)
    tokenizer_path = find_tokenizer_file(folder)
    tokenizer = read_tokenizer_file(tokenizer_path)
    loaded = load_model(folder).eval()
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= loaded.vocab_size:
        raise UserError(
            f"{tokenizer_path}: has ids up to {largest}; the model in {folder} knows up to {loaded.vocab_size - 1}"
        )
    return loaded, tokenizer


def find_tokenizer_file(folder: Path) -> Path:
    """The tokenizer of the model in a folder: in it, or in one of the two folders above.

    Raises:
        UserError: there is none.
    """
    places = [folder, *folder.resolve().parents][:TOKENIZER_LEVELS]
    for place in places:
        if (place / TOKENIZER_FILE).is_file():
            return place / TOKENIZER_FILE
    raise UserError(f"{folder}: no {TOKENIZER_FILE} here or in the {TOKENIZER_LEVELS - 1} folders above")
