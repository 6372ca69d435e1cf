"""The shape of the models that are damaged."""

from new_llm.config import PythiaConfig

TINY = PythiaConfig(
    vocab_size=32,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
    max_position_embeddings=32,
)
