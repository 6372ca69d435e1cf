"""Hugging Face models as subjects: GPT-NeoX ones become models of this project, others are read through a wrapper."""

import re
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from new_llm.config import DataConfig, UserError
from new_llm.config.files import read_json_file
from new_llm.data.hub import describe_failure, hub_answers, hub_endpoint
from new_llm.data.tokenizer import get_tokenizer
from new_llm.evaluation.hugging_face import HuggingFaceLM
from new_llm.models import TransformerLM
from new_llm.models.hf.convert import load_pythia

CONFIG_FILE = "config.json"
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)


def load_hugging_face(
    name: str, revision: str | None, segment_length: int | None
) -> tuple[TransformerLM | HuggingFaceLM, Tokenizer, str]:
    """The model of a folder or a hub name, its tokenizer and its model type. No code of the checkpoint is ever run.

    Raises:
        UserError: it is neither a folder of a Hugging Face model nor on a hub in reach, or can't be loaded.
    """
    kind = _read_model_type(name, revision)
    model: TransformerLM | HuggingFaceLM
    if kind == "gpt_neox":
        try:
            model = load_pythia(name, revision=revision, segment_length=segment_length)
        except ValueError as error:
            raise error if isinstance(error, UserError) else UserError(f"--segment-length: {error}") from None
    else:
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        import new_llm.models.hf  # registers this project's models with the Auto classes

        disable_progress_bar()
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                name, revision=revision or "main", torch_dtype="auto", trust_remote_code=False
            )
        except Exception as error:  # transformers raises whatever its many parts raise
            raise UserError(f"{name}: can't be loaded as a causal language model: {describe_failure(error)}") from None
        if kind == new_llm.models.hf.NewLLMConfig.model_type:
            if segment_length is not None:
                raise UserError(f"--segment-length: {name} has its own ({loaded.model.segment_length})")
            model = loaded.model
        else:
            model = HuggingFaceLM(loaded, segment_length)
    return model, get_tokenizer(name, DataConfig.hub_timeout_seconds), kind


def _read_model_type(name: str, revision: str | None) -> str:
    import huggingface_hub

    path = Path(name).expanduser() / CONFIG_FILE
    if not path.parent.is_dir():
        if not HUB_NAME.fullmatch(name):
            raise UserError(f"{name}: no such folder, and no name of a model on the hub either")
        try:
            if hub_answers(f"{name}/resolve/{revision or 'main'}/{CONFIG_FILE}", DataConfig.hub_timeout_seconds):
                cached: Any = huggingface_hub.hf_hub_download(name, CONFIG_FILE, revision=revision)
            else:
                cached = huggingface_hub.try_to_load_from_cache(name, CONFIG_FILE, revision=revision)
        except Exception as error:
            raise UserError(f"{name}: could not be loaded: {describe_failure(error)}") from None
        if not isinstance(cached, str):
            raise UserError(
                f"{name}: no such folder, nothing of this name is cached here, and the hub at {hub_endpoint()} is out "
                "of reach; give a run folder, or a folder that save_pretrained or `new-llm export` wrote"
            )
        path = Path(cached)
    try:
        values = read_json_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    kind = values.get("model_type") if isinstance(values, dict) else None
    if not isinstance(kind, str):
        raise UserError(f"{path}: names no model_type")
    return kind
