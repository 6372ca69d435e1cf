"""The configuration of a `transformers` model of the family: `model.json`'s structure and what tools ask for."""

from typing import Any

from transformers import PretrainedConfig

from new_llm.config import PythiaConfig, UserError
from new_llm.models.model_file import FORMAT_VERSION, describe_model
from new_llm.models.transformer import TransformerLM

STRUCTURE_FIELDS = (
    "format_version",
    "vocab_size",
    "segment_length",
    "layer_norm_eps",
    "tie_word_embeddings",
    "selective",
    "layers",
)


class NewLLMConfig(PretrainedConfig):
    """What `NewLLMForCausalLM` is made from.

    Args:
        layers: the layers, each `{"kind": "infini", ...}` with the arguments of a registered layer class.
        vocab_size: rows of the embedding and the head.
        segment_length: tokens in a segment.
        layer_norm_eps: ε of the final LayerNorm.
        selective: options of a selective model; None: one pass.
        format_version: version of this description.
        max_position_embeddings: tokens that a tool may give in one call. The model itself has no limit: positions
            restart in every segment and memory carries the rest. None: a Pythia's 2048, or a segment where that is
            longer, so that models cut into different segments are measured on the same texts.
        initializer_range: standard deviation of fresh weights.
        use_cache: return a cache where no gradients are recorded.
        kwargs: the rest, as in any `PretrainedConfig`.

    Raises:
        UserError: tied embeddings: `TransformerLM.untie_embeddings` gives the head a weight of its own.
    """

    model_type = "new_llm"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - transformers' own name and type

    def __init__(
        self,
        layers: list[dict[str, Any]] | None = None,
        vocab_size: int = PythiaConfig.vocab_size,
        segment_length: int = PythiaConfig.max_position_embeddings,
        layer_norm_eps: float = PythiaConfig.layer_norm_eps,
        selective: dict[str, Any] | None = None,
        format_version: int = FORMAT_VERSION,
        max_position_embeddings: int | None = None,
        initializer_range: float = PythiaConfig.initializer_range,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        if kwargs.pop("tie_word_embeddings", False):
            raise UserError(
                "tie_word_embeddings: true; only false is allowed in transformers' form; model.untie_embeddings() "
                "gives a model's head a weight of its own, with the same logits"
            )
        self.layers = layers or []
        self.vocab_size = vocab_size
        self.segment_length = segment_length
        self.layer_norm_eps = layer_norm_eps
        self.selective = selective
        self.format_version = format_version
        self.max_position_embeddings = max_position_embeddings or max(
            segment_length, PythiaConfig.max_position_embeddings
        )
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        super().__init__(**kwargs)
        self.tie_word_embeddings = False

    @classmethod
    def from_model(cls, model: TransformerLM, **kwargs: Any) -> "NewLLMConfig":
        """The configuration of a model; `kwargs` are the arguments that a model does not know, such as eos_token_id.

        Raises:
            ValueError: a layer of a class that is not registered.
        """
        return cls(**{**describe_model(model), **kwargs})

    @property
    def structure(self) -> dict[str, Any]:
        """What `model_file.build_model` makes the model from."""
        return {name: getattr(self, name) for name in STRUCTURE_FIELDS}

    @property
    def num_hidden_layers(self) -> int:
        """Layers."""
        return len(self.layers)

    @property
    def hidden_size(self) -> int | None:
        """D; None where a layer of another make calls it otherwise."""
        return self.layers[0].get("hidden_size") if self.layers else None
