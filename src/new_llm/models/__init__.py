"""Models: the family's factory, the language model, its state and its stream."""

from new_llm.models.factory import create_model
from new_llm.models.selective import SelectiveOutputLM
from new_llm.models.state import MemoryState, merge_memory_states
from new_llm.models.stream import MemoryStream
from new_llm.models.transformer import TransformerLM

__all__ = ["MemoryState", "MemoryStream", "SelectiveOutputLM", "TransformerLM", "create_model", "merge_memory_states"]
