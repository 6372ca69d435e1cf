"""`create_model`: a model of the family by its name."""

import functools
from collections.abc import Callable
from typing import Any

from new_llm.config import MODEL_OPTIONS, MemoryConfig, ModelConfig, ModelType, PythiaConfig, SelectiveConfig
from new_llm.models.layers import HierarchicalLayer, InfiniLayer, Layer, MultiMemoryLayer, PythiaLayer, TokenMemoryLayer
from new_llm.models.selective import SelectiveOutputLM
from new_llm.models.transformer import TransformerLM


def build_pythia_layer(config: PythiaConfig) -> PythiaLayer:
    """One softmax layer of the configured shape."""
    return PythiaLayer(
        config.hidden_size,
        config.num_attention_heads,
        config.intermediate_size,
        rotary_pct=config.rotary_pct,
        rotary_emb_base=config.rotary_emb_base,
        layer_norm_eps=config.layer_norm_eps,
    )


def _build_memory_layer(kind: Callable[..., Layer]) -> Callable[..., Layer]:
    def build(config: PythiaConfig, **options: Any) -> Layer:
        return kind(
            config.hidden_size,
            config.num_attention_heads,
            config.intermediate_size,
            layer_norm_eps=config.layer_norm_eps,
            **options,
        )

    return build


MEMORY_LAYERS: dict[ModelType, Callable[..., Layer]] = {
    ModelType.INFINI: _build_memory_layer(InfiniLayer),
    ModelType.MULTI_MEMORY: _build_memory_layer(MultiMemoryLayer),
    ModelType.HIERARCHICAL: _build_memory_layer(HierarchicalLayer),
}
"""The memory layer of each model that has one."""


def create_model(
    model_type: str | ModelType,
    config: PythiaConfig | None = None,
    *,
    segment_length: int | None = None,
    **options: Any,
) -> TransformerLM:
    """A model of the family with fresh weights from torch's global generator.

    Args:
        model_type: pythia, infini, multi_memory, hierarchical; token_memory, a Pythia with a memory before its head;
            selective, a Pythia with extra passes; or deep_pythia, a Pythia with as many layers as such a selective
            model runs.
        config: the shape; None: pythia-70m's.
        segment_length: tokens in a segment; None: max_position_embeddings.
        options: options of the model type; see `MODEL_OPTIONS`, `MemoryConfig` and `SelectiveConfig`.

    Raises:
        ValueError: an unknown model type or option, or a value out of range: names what is allowed.
    """
    try:
        kind = ModelType(model_type)
    except ValueError:
        raise ValueError(f"model_type: {str(model_type)!r} is unknown; allowed are {', '.join(ModelType)}") from None
    allowed = MODEL_OPTIONS[kind]
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise ValueError(
            f"{kind} takes no option {', '.join(unknown)}; allowed are {', '.join((*allowed, 'segment_length'))}"
        )
    config = config or PythiaConfig()
    ModelConfig(num_hidden_layers=config.num_hidden_layers, **options)  # refuses values out of range by name
    length = config.max_position_embeddings if segment_length is None else segment_length
    if not isinstance(length, int) or not 1 <= length <= config.max_position_embeddings:
        raise ValueError(
            f"segment_length: {length} is out of range; allowed are 1 to max_position_embeddings "
            f"({config.max_position_embeddings})"
        )
    num_layers = config.num_hidden_layers
    model_kind: Callable[..., TransformerLM] = TransformerLM
    if kind == ModelType.SELECTIVE:
        model_kind, options = functools.partial(SelectiveOutputLM, **options), {}
    elif kind == ModelType.DEEP_PYTHIA:
        num_layers, options = num_layers * (1 + options.get("skip_interval", SelectiveConfig.skip_interval)), {}
    before_head: list[Layer] = []
    if kind == ModelType.TOKEN_MEMORY:
        before_head, options = [TokenMemoryLayer(config.hidden_size, **options)], {}
    places = options.pop("memory_layers", MemoryConfig.memory_layers) if "memory_layers" in allowed else ()
    build_memory_layer = MEMORY_LAYERS.get(kind, build_pythia_layer)
    layers = [
        build_memory_layer(config, **options) if index in places else build_pythia_layer(config)
        for index in range(num_layers)
    ]
    return model_kind(
        [*layers, *before_head],
        vocab_size=config.vocab_size,
        segment_length=length,
        layer_norm_eps=config.layer_norm_eps,
        initializer_range=config.initializer_range,
        tie_word_embeddings=config.tie_word_embeddings,
    )
