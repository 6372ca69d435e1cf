"""Language models: how to build, save and stream them, and their memory."""

from typing import TYPE_CHECKING, Any

from new_llm.models.factory import ModelType, create_model
from new_llm.models.memory_file import load_memory_file, save_memory_file
from new_llm.models.model_file import load_model, save_model
from new_llm.models.state import LayerMemory, MemoryState, merge_memory_states
from new_llm.models.stream import MemoryStream
from new_llm.models.transformer import SelectiveOutputLM, TransformerLM

if TYPE_CHECKING:
    from new_llm.models.hf.gpt_neox import export_pythia

__all__ = [
    "LayerMemory",
    "MemoryState",
    "MemoryStream",
    "ModelType",
    "SelectiveOutputLM",
    "TransformerLM",
    "create_model",
    "export_pythia",
    "load_memory_file",
    "load_model",
    "merge_memory_states",
    "save_memory_file",
    "save_model",
]


def __getattr__(name: str) -> Any:
    if name == "export_pythia":  # lazy, so that importing models does not import transformers
        from new_llm.models.hf.gpt_neox import export_pythia

        return export_pythia
    raise AttributeError(f"module 'new_llm.models' has no attribute {name!r}")
