"""The layers that a model is composed of: one block each."""

from new_llm.models.layers.base import LAYER_KINDS, Attention, Layer, Segments, Step, check_order, register_layer
from new_llm.models.layers.compressive import CompressiveAttention
from new_llm.models.layers.hierarchical import HierarchicalLayer
from new_llm.models.layers.infini import InfiniLayer
from new_llm.models.layers.memory_attention import MemoryAttention
from new_llm.models.layers.memory_layer import MemoryLayer
from new_llm.models.layers.multi_memory import MultiMemoryLayer
from new_llm.models.layers.parallel_infini import ParallelInfiniLayer
from new_llm.models.layers.pythia import PythiaLayer
from new_llm.models.layers.token_memory import TokenMemoryLayer

__all__ = [
    "LAYER_KINDS",
    "Attention",
    "CompressiveAttention",
    "HierarchicalLayer",
    "InfiniLayer",
    "Layer",
    "MemoryAttention",
    "MemoryLayer",
    "MultiMemoryLayer",
    "ParallelInfiniLayer",
    "PythiaLayer",
    "Segments",
    "Step",
    "TokenMemoryLayer",
    "check_order",
    "register_layer",
]
