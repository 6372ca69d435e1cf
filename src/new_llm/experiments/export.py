"""A run's model as a folder for Hugging Face's tools, with a model card of the run's figures."""

from pathlib import Path
from typing import Any, Literal

from new_llm.config import UserError
from new_llm.config.files import write_text_atomically
from new_llm.experiments.model_card import write_card
from new_llm.experiments.record import DATA_FILE, ENVIRONMENT_FILE, MODEL_RESULT_FILE, read_json
from new_llm.experiments.run_folder import find_model_folder, load_run_model
from new_llm.models.model_file import STRUCTURE_FILE

CARD_FILE = "README.md"


def export_run(
    run: str | Path, model: str | None, directory: str | Path, *, layout: Literal["auto", "gpt_neox"] = "auto"
) -> None:
    """Write a run's model with its best weights, its tokenizer and a model card.

    Args:
        run: a run folder, or the folder of a saved model.
        model: which model of a run folder; None: the only one.
        directory: where to write; a model that stands there is replaced.
        layout: auto, for every kind of model; gpt_neox, for plain Pythia models.

    Raises:
        UserError: there is no such model, GPT-NeoX can't express it, or the folder can't be written.
    """
    run, directory = Path(run), Path(directory).expanduser()
    source = find_model_folder(run, model)
    if (directory / STRUCTURE_FILE).is_file():
        raise UserError(f"{directory}: a model of this project is stored here; choose another folder to export to")
    loaded, tokenizer = load_run_model(run, model)
    from new_llm.models.hf import export_auto, export_pythia

    loaded.untie_embeddings()
    export = export_pythia if layout == "gpt_neox" else export_auto
    export(loaded, directory, tokenizer)
    card = write_card(loaded, read_figures(source), layout, directory.resolve().name)
    write_text_atomically(directory / CARD_FILE, card)


def read_figures(folder: Path) -> dict[str, Any]:
    """What the run of a model's folder says of it: `result`, `data`, `environment`; empty where it says nothing."""
    places = {"result": folder.parent / MODEL_RESULT_FILE}
    places |= {"data": folder.parent.parent / DATA_FILE, "environment": folder.parent.parent / ENVIRONMENT_FILE}
    if not places["result"].is_file():
        return {}
    return {name: read_json(path) or {} for name, path in places.items()}
