"""Models: the family's factory, the language model, its state and its stream."""

from typing import TYPE_CHECKING, Any

from new_llm.models.factory import ModelType, create_model
from new_llm.models.selective import SelectiveOutputLM
from new_llm.models.state import MemoryState, merge_memory_states
from new_llm.models.stream import MemoryStream
from new_llm.models.transformer import TransformerLM

if TYPE_CHECKING:
    from new_llm.models.hf.convert import export_pythia

__all__ = [
    "MemoryState",
    "MemoryStream",
    "ModelType",
    "SelectiveOutputLM",
    "TransformerLM",
    "create_model",
    "export_pythia",
    "merge_memory_states",
]


def __getattr__(name: str) -> Any:
    if name == "export_pythia":  # lazily: models must not wait for transformers
        from new_llm.models.hf.convert import export_pythia

        return export_pythia
    raise AttributeError(f"module 'new_llm.models' has no attribute {name!r}")
