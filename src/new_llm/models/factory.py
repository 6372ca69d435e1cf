"""`create_model`: the model types, their options and recipes, and how their models are built."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

import torch
from pydantic import Field

from new_llm.config import PythiaConfig, UserError
from new_llm.config.loading import load_by_name
from new_llm.config.sections import section, short
from new_llm.models.cost import check_fits
from new_llm.models.layers import LAYER_KINDS, Layer, PythiaLayer, RecurrentMemoryStack, build_layer
from new_llm.models.layers.base import NoOptions
from new_llm.models.layers.rmt import RecurrentMemoryOptions
from new_llm.models.transformer import DepthOptions, SelectiveOptions, SelectiveOutputLM, TransformerLM


@section
class PlacementOptions:
    """Which layers of the stack have memory."""

    memory_layers: Annotated[tuple[int, ...], Field(min_length=1), short("--memory-layers")] = (0,)
    """Indices of the memory layers, from 0; negative ones count from the end. All other layers are Pythia layers."""


@dataclass(frozen=True)
class ModelKind:
    """A model type.

    Attributes:
        options: the dataclasses of its options.
        build: builds its layers from the shape and all options.
        is_selective: whether the model runs several passes, so that the options are the model's, not its layers'.
        reads_segments: whether an experiment cuts its samples into segments; if False, it reads them whole.
        is_matched: whether `match_parameters` adjusts its width; False if the model is meant to be larger.
    """

    options: tuple[type, ...]
    build: Callable[[PythiaConfig, dict[str, Any]], list[Layer]]
    is_selective: bool = False
    reads_segments: bool = False
    is_matched: bool = True

    @property
    def defaults(self) -> dict[str, Any]:
        """Default values by option name."""
        return {key: value for kind in self.options for key, value in dataclasses.asdict(kind()).items()}


def _build_pythia(shape: PythiaConfig, options: dict[str, Any]) -> list[Layer]:
    return [build_layer(PythiaLayer, shape) for _ in range(shape.num_hidden_layers)]


def _build_deep(shape: PythiaConfig, options: dict[str, Any]) -> list[Layer]:
    num_layers = shape.num_hidden_layers * (1 + options["skip_interval"])
    return _build_pythia(dataclasses.replace(shape, num_hidden_layers=num_layers), {})


def _build_rmt(shape: PythiaConfig, options: dict[str, Any]) -> list[Layer]:
    return [build_layer(RecurrentMemoryStack, shape, num_layers=shape.num_hidden_layers, **options)]


def _describe_layer_model(layer_type: type[Layer]) -> ModelKind:
    """The type of models where this layer replaces some or all Pythia layers, or stands between them and the head."""
    is_placed = not (layer_type.fills_model or layer_type.stands_before_head)

    def build(shape: PythiaConfig, options: dict[str, Any]) -> list[Layer]:
        if layer_type.stands_before_head:
            return [*_build_pythia(shape, {}), build_layer(layer_type, shape, **options)]
        places = set(range(shape.num_hidden_layers))
        if is_placed:
            options = dict(options)
            places = find_places(options.pop("memory_layers"), shape.num_hidden_layers)
        return [
            build_layer(layer_type, shape, **options) if index in places else build_layer(PythiaLayer, shape)
            for index in range(shape.num_hidden_layers)
        ]

    options = (PlacementOptions, layer_type.options_type) if is_placed else (layer_type.options_type,)
    return ModelKind(options, build, reads_segments=layer_type.has_memory)


def find_places(given: tuple[int, ...], num_layers: int) -> set[int]:
    """Resolve `memory_layers` to indices from 0. Raises UserError for unknown layers and duplicates."""
    if any(not -num_layers <= index < num_layers for index in given):
        raise UserError(f"memory_layers: {list(given)}: the layers are 0 to {num_layers - 1}")
    places = {index % num_layers for index in given}
    if len(places) < len(given):
        raise UserError(f"memory_layers: {list(given)} names a layer twice")
    return places


MODEL_KINDS: dict[str, ModelKind] = {
    "pythia": ModelKind((NoOptions,), _build_pythia),
    "pythia_segments": ModelKind((NoOptions,), _build_pythia, reads_segments=True),
    **{
        name: _describe_layer_model(layer_type)
        for name, layer_type in LAYER_KINDS.items()
        if layer_type.is_model_type and layer_type is not PythiaLayer
    },
    "rmt": ModelKind((RecurrentMemoryOptions,), _build_rmt, reads_segments=True),
    "selective": ModelKind((SelectiveOptions,), _build_pythia, is_selective=True),
    "deep_pythia": ModelKind((DepthOptions,), _build_deep, is_matched=False),
}
"""The built-in model types by name. A layer of the user's own is a model type, too: `my_module:MyLayer`."""

ModelType = StrEnum("ModelType", {name.upper(): name for name in MODEL_KINDS})
"""The built-in model types as an enum, for completion in editors: `ModelType.INFINI` is "infini"."""


def find_model_kind(model_type: str) -> ModelKind:
    """Find a model type by name, `my_module:MyLayer` in its module. Raises ValueError, with the known names."""
    name = str(model_type)
    if ":" in name:
        layer_type = load_by_name(name, "a layer")
        if not isinstance(layer_type, type) or not issubclass(layer_type, Layer) or "kind" not in vars(layer_type):
            raise UserError(f"{name} is not a layer class decorated with register_layer")
        return _describe_layer_model(layer_type)
    if name in LAYER_KINDS and name not in MODEL_KINDS and LAYER_KINDS[name].is_model_type:
        return _describe_layer_model(LAYER_KINDS[name])  # registered by the calling program
    if name not in MODEL_KINDS:
        allowed = ", ".join(MODEL_KINDS)
        raise UserError(f"model_type: {name!r} is unknown; allowed are {allowed}, or my_module:MyLayer")
    return MODEL_KINDS[name]


# Named recipes: options that worked better than the defaults in a study, or that a mechanism's authors use.
# Select one by `create_model("infini", recipe="tuned")` or `--recipe tuned`; options given explicitly override it.


_TUNED_MEMORY: dict[str, Any] = {
    # From the last layer, reads reach the head directly. The figures are in docs/experiments/memory.md, "All tables".
    "memory_layers": (-1,),
    # Gates start open, at 0.88, which is where training takes them anyway.
    "gate_init": 2.0,
    # A query finds what followed similar contexts.
    "use_key_shift": True,
    # Each token has few large features, and W_k starts as W_q, so that only similar tokens match ("plain-start").
    "query_key_init_scale": 6.0,
    "query_key_init_bias": -3.0,
    "match_query_key_init": True,
}

RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "tuned": {
        "infini": _TUNED_MEMORY,
        "multi_memory": _TUNED_MEMORY,
        "hierarchical": _TUNED_MEMORY,
        # from studies/token-ablations.yaml, whose variant "plain-start" does worse
        "token_memory": {"query_key_init_scale": 6.0},
    },
    # The parts of a gated delta rule, in the Infini layer. On addresses this gained more than twice as much as "tuned",
    # but with samples of 4 segments instead of 8 (docs/experiments/addresses.md).
    "tokenwise": {
        "infini": {
            "local_attention": "softmax",
            "key_features": "unit",
            "use_normalizer": False,
            "use_token_strength": True,
            "use_token_decay": True,
            "use_token_gate": True,
            "convolution_size": 4,
        },
    },
    # Each mechanism in its authors' form, if that differs from the default.
    "published": {
        "infini": {"local_attention": "softmax"},  # arXiv:2404.07143
        "multi_memory": {"router": "top1"},  # arXiv:2502.13685
        "hierarchical": {"hierarchy": "fenwick"},  # arXiv:2506.04761
        # arXiv:2604.21106: the projection starts as the identity, and each pass gets the embedding and has a loss.
        "selective": {"projection_init": "identity", "add_embedding": True, "earlier_pass_weight": 1.0},
    },
}
"""Options by recipe and model type; a model type that a recipe does not list keeps its defaults."""


def resolve_options(model_type: str, options: Mapping[str, Any], recipe: str | None = None) -> dict[str, Any]:
    """All options of a model type: `options` override the recipe, which overrides the defaults.

    Raises:
        ValueError: the model type, recipe or an option is unknown, or a value is out of range.
    """
    kind = find_model_kind(model_type)
    if recipe is not None and recipe not in RECIPES:
        raise UserError(f"recipe: {recipe!r} is unknown; allowed are {', '.join(RECIPES)}")
    allowed = kind.defaults
    if unknown := sorted(set(options) - set(allowed)):
        names = ", ".join((*allowed, "segment_length"))
        raise UserError(f"{model_type} has no option {', '.join(unknown)}; allowed are {names}")
    values = {**(RECIPES[recipe].get(str(model_type), {}) if recipe else {}), **options}
    resolved: dict[str, Any] = {}
    for part in kind.options:
        names = {field.name for field in dataclasses.fields(part)}
        try:
            checked = part(**{name: value for name, value in values.items() if name in names})
        except UserError as error:
            raise UserError(f"{model_type}: {error}") from None
        resolved |= dataclasses.asdict(checked)
    return resolved


MATCHED_SHARE = 0.01
"""Tolerance of `match_parameters`, as a share of the number of parameters."""


def match_parameters(model_type: str, shape: PythiaConfig, **options: Any) -> PythiaConfig:
    """Adjust the MLP width so that a model has as many parameters as a Pythia of the given shape.

    The shape stays the same if the numbers already agree within `MATCHED_SHARE`, or if the model has no MLPs.

    Raises:
        UserError: the model has more parameters even with MLPs of width 1.
    """
    if not find_model_kind(model_type).is_matched:
        return shape

    def count(kind: str, width: int, **options: Any) -> int:
        with torch.device("meta"):  # nothing is allocated or drawn
            made = create_model(kind, dataclasses.replace(shape, intermediate_size=width), **options)
        return made.num_parameters()["total"]

    width = shape.intermediate_size
    wanted, found = count("pythia", width), count(model_type, width, **options)
    per_unit = count(model_type, width + 1, **options) - found
    if abs(found - wanted) <= MATCHED_SHARE * wanted or per_unit == 0:
        return shape
    matched = width + round((wanted - found) / per_unit)
    if matched < 1:
        raise UserError(
            f"model.match_parameters: {model_type} has {found - wanted:,} parameters more than a Pythia of this shape, "
            "which narrower MLPs can't make up for: set model.intermediate_size, or match_parameters to false"
        )
    return dataclasses.replace(shape, intermediate_size=matched)


def create_model(
    model_type: str,
    config: PythiaConfig | None = None,
    *,
    size: str | None = None,
    recipe: str | None = None,
    segment_length: int | None = None,
    **options: Any,
) -> TransformerLM:
    """Create a model with new weights, drawn from torch's global generator.

    Args:
        model_type: pythia; pythia_segments, the same model, which experiments cut into segments; infini;
            multi_memory; hierarchical; gated_delta; token_memory, a Pythia with a memory before its head;
            transformer_xl, whose layers cache the last tokens' keys and values; rmt, which passes memory vectors from
            segment to segment; selective, a Pythia with extra passes; deep_pythia, a Pythia with as many layers as
            that model runs in all passes; or a layer of your own, `my_module:MyLayer`.
        config: the shape; None: that of `size`.
        size: the name of a shape, 14m to 410m; None: 70m.
        recipe: the name of a set of options, see `RECIPES`; None: the defaults.
        segment_length: number of tokens in a segment; None: max_position_embeddings.
        options: fields of the model type's option dataclasses, see `ModelKind.options`.

    Raises:
        ValueError: the model type, recipe or an option is unknown, or a value is out of range; the message lists what
            is allowed. Or the model is too large for this machine.
    """
    resolved = resolve_options(model_type, options, recipe)
    if config is not None and size is not None:
        raise UserError(f"size: {size} can't be combined with a config; give only one of them")
    shape = config or PythiaConfig.of_size(size or "70m")
    most, kind = shape.max_position_embeddings, find_model_kind(model_type)
    length = most if segment_length is None else segment_length
    if not isinstance(length, int) or not 1 <= length <= most:
        raise UserError(f"segment_length: {length} is out of range; allowed are 1 to max_position_embeddings ({most})")
    if torch.get_default_device().type == "cpu":  # other devices refuse at once to allocate too much
        with torch.device("meta"):
            check_fits(kind.build(shape, resolved), shape.vocab_size)
    model_class: Callable[..., TransformerLM] = SelectiveOutputLM if kind.is_selective else TransformerLM
    return model_class(
        kind.build(shape, resolved),
        vocab_size=shape.vocab_size,
        segment_length=length,
        layer_norm_eps=shape.layer_norm_eps,
        initializer_range=shape.initializer_range,
        tie_word_embeddings=shape.tie_word_embeddings,
        **(resolved if kind.is_selective else {}),
    )
