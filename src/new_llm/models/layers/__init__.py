"""The layers that models are made of."""

from new_llm.models.layers.base import (
    LAYER_KINDS,
    MLP,
    Attention,
    Block,
    Layer,
    ReadTokens,
    Segments,
    Step,
    build_layer,
    register_layer,
)
from new_llm.models.layers.compressive import CompressiveAttention
from new_llm.models.layers.gated_delta import GatedDeltaLayer
from new_llm.models.layers.hierarchical import HierarchicalLayer
from new_llm.models.layers.infini import InfiniLayer, ParallelInfiniLayer
from new_llm.models.layers.memory_layer import MemoryAttention, MemoryLayer
from new_llm.models.layers.multi_memory import MultiMemoryLayer
from new_llm.models.layers.pythia import PythiaLayer
from new_llm.models.layers.rmt import RecurrentMemoryStack
from new_llm.models.layers.token_memory import TokenMemoryLayer
from new_llm.models.layers.transformer_xl import TransformerXLLayer

__all__ = [
    "LAYER_KINDS",
    "MLP",
    "Attention",
    "Block",
    "CompressiveAttention",
    "GatedDeltaLayer",
    "HierarchicalLayer",
    "InfiniLayer",
    "Layer",
    "MemoryAttention",
    "MemoryLayer",
    "MultiMemoryLayer",
    "ParallelInfiniLayer",
    "PythiaLayer",
    "ReadTokens",
    "RecurrentMemoryStack",
    "Segments",
    "Step",
    "TokenMemoryLayer",
    "TransformerXLLayer",
    "build_layer",
    "register_layer",
]
