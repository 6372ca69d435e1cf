"""Language models: how to build, save and stream them, and their memory."""

from new_llm.models.factory import ModelType, create_model
from new_llm.models.memory_file import load_memory_file, save_memory_file
from new_llm.models.model_file import load_model, save_model
from new_llm.models.state import LayerMemory, MemoryState, merge_memory_states
from new_llm.models.stream import MemoryStream
from new_llm.models.transformer import SelectiveOutputLM, TransformerLM

__all__ = [
    "LayerMemory",
    "MemoryState",
    "MemoryStream",
    "ModelType",
    "SelectiveOutputLM",
    "TransformerLM",
    "create_model",
    "load_memory_file",
    "load_model",
    "merge_memory_states",
    "save_memory_file",
    "save_model",
]
