"""The registry of layers: one decorator gives a layer its name, and everything else is derived from it."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

from new_llm.config import PythiaConfig
from new_llm.config.sections import section
from new_llm.models.layers.base import Layer

LayerType = TypeVar("LayerType", bound=type[Layer])
LAYER_KINDS: dict[str, type[Layer]] = {}
"""The layer classes by the name they are registered with."""


@section
class NoOptions:
    """The options of a layer that has none."""


def register_layer(
    name: str, *, options: type = NoOptions, model_type: bool = True
) -> Callable[[LayerType], LayerType]:
    """Class decorator: the name becomes a model type, its options become flags, and models with the layer are saved.

    Args:
        name: the layer's kind, as `create_model` and `--models` take it.
        options: a dataclass of the keywords that the constructor takes beside the model's shape (see `build_layer`),
            with their defaults; plain values, since they are written to model files.
        model_type: whether a model of Pythia layers with some of this kind is a model type of its own.

    Raises:
        ValueError: another class has this name.
    """

    def register(layer_type: LayerType) -> LayerType:
        taken = LAYER_KINDS.setdefault(name, layer_type)
        if (taken.__module__, taken.__qualname__) != (layer_type.__module__, layer_type.__qualname__):
            raise ValueError(f"layer kind {name!r} is taken by {taken.__name__}")
        LAYER_KINDS[name] = layer_type  # a notebook's cell may define its layer again
        layer_type.kind, layer_type.options_type, layer_type.is_model_type = name, options, model_type
        _record_settings(layer_type)
        return layer_type

    return register


def _record_settings(layer_type: type[Layer]) -> None:
    """Let each new layer keep its constructor's arguments, defaults included, as `settings`."""
    initialize: Any = layer_type.__init__
    signature = inspect.signature(initialize)

    @functools.wraps(initialize)
    def __init__(self: Layer, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        initialize(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        settings: dict[str, Any] = {}
        for parameter, value in list(bound.arguments.items())[1:]:
            settings |= (
                value if signature.parameters[parameter].kind == inspect.Parameter.VAR_KEYWORD else {parameter: value}
            )
        names = {field.name for field in dataclasses.fields(layer_type.options_type)}
        given = {key: value for key, value in settings.items() if key in names}
        self.settings = settings | dataclasses.asdict(cast(Any, layer_type.options_type(**given)))

    cast(Any, layer_type).__init__ = __init__


def build_layer(layer_type: type[Layer], shape: PythiaConfig, **options: Any) -> Layer:
    """A layer of a model's shape: of `shape` its constructor is given the fields that it names.

    It may name hidden_size, num_heads, intermediate_size, layer_norm_eps, rotary_pct and rotary_emb_base.
    """
    fields = {
        "hidden_size": shape.hidden_size,
        "num_heads": shape.num_attention_heads,
        "intermediate_size": shape.intermediate_size,
        "layer_norm_eps": shape.layer_norm_eps,
        "rotary_pct": shape.rotary_pct,
        "rotary_emb_base": shape.rotary_emb_base,
    }
    named = inspect.signature(layer_type).parameters
    return layer_type(**{name: value for name, value in fields.items() if name in named}, **options)
