"""Importing and exporting Pythia: GPT-NeoX checkpoints of old and new versions of `transformers`.

| | `transformers` up to 4 | `transformers` from 5 | New-LLM, in memory |
|---|---|---|---|
| rotary share and base | `rotary_pct`, `rotary_emb_base` | `rope_parameters` | `PythiaConfig` |
| head in memory | `embed_out` | `lm_head` | `embed_out` |
| head on disk | `embed_out.weight` | `embed_out.weight` | |
"""

import functools
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import torch
from huggingface_hub import save_torch_state_dict
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import GenerationConfig

from new_llm.config import PythiaConfig, UserError
from new_llm.config.files import shorten
from new_llm.models.factory import create_model
from new_llm.models.hf.folder import (
    CONFIG_FILE,
    find_checkpoint,
    read_config,
    read_weights,
    stage_folder,
)
from new_llm.models.layers import LAYER_KINDS, Layer, PythiaLayer, build_layer
from new_llm.models.layers.base import initialize_weights
from new_llm.models.tensor_files import check_finite
from new_llm.models.transformer import TransformerLM, check_order

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODEL_TYPE = "gpt_neox"
PREFIX = "gpt_neox."
EMBEDDING = "embed_in.weight"
HEAD = "embed_out.weight"
OTHER_HEAD = "lm_head.weight"
OLD_BUFFERS = re.compile(r"(layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\..+)|rotary_emb\..+)")
"""Constants that older versions of `transformers` stored with the weights."""
SHAPE_KEYS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
OTHER_KEYS = ("max_position_embeddings", "layer_norm_eps", "initializer_range", "tie_word_embeddings")
FIXED_KEYS: dict[str, Any] = {
    "hidden_act": "gelu",
    "use_parallel_residual": True,
    "attention_bias": True,
}
"""The only values that `PythiaLayer` supports, which all Pythia models have; also the defaults of missing keys."""
DROPOUT_KEYS = ("attention_dropout", "hidden_dropout")
MAX_NAMES = 5  # number of weights that an error lists
LayerChoice = str | Mapping[str, Any] | Layer
"""A kind ("infini"), a kind with options ({"kind": "infini", "num_memory_heads": 8}), or a layer."""
FUSED = "attention.query_key_value."
"""The fused projection to q, k and v, whose rows are ordered by head."""


def parse_config(values: dict[str, Any], where: str) -> PythiaConfig:
    """The shape that a GPT-NeoX `config.json` describes, in the layout of any `transformers` version.

    Raises:
        UserError: the model type is another one, a key is missing, or an option is not supported by `PythiaLayer`.
    """
    found = values.get("model_type")
    if found != MODEL_TYPE:
        hint = "; AutoModelForCausalLM.from_pretrained loads it" if found == "new_llm" else ""
        raise UserError(f"{where}: model_type {found!r}; only {MODEL_TYPE!r} (Pythia, GPT-NeoX) can be read{hint}")
    if missing := [key for key in SHAPE_KEYS if values.get(key) is None]:
        raise UserError(f"{where}: {', '.join(missing)} missing")
    for key, allowed in FIXED_KEYS.items():
        if values.get(key, allowed) != allowed:
            raise UserError(f"{where}: {key} is {values[key]!r}; Pythia layers only support {allowed!r}")
    if dropped := [key for key in DROPOUT_KEYS if values.get(key)]:
        warnings.warn(f"{where}: {', '.join(dropped)}: New-LLM has no dropout, not even in training", stacklevel=3)
    for key in ("rope_parameters", "rope_scaling"):
        rope = values.get(key) or {}
        if not isinstance(rope, dict):
            raise UserError(f"{where}: {key} is not a mapping")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise UserError(f"{where}: {key} of type {kind!r}; Pythia layers have plain rotary positions ('default')")
    given = {key: values[key] for key in (*SHAPE_KEYS, *OTHER_KEYS) if values.get(key) is not None}
    rope = values.get("rope_parameters") or {}
    for key, new_key in (("rotary_pct", "partial_rotary_factor"), ("rotary_emb_base", "rope_theta")):
        for found in (values.get(new_key), values.get(key), rope.get(new_key)):  # the newest layout takes precedence
            given |= {} if found is None else {key: found}
    try:
        return PythiaConfig(**given)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def write_config(config: PythiaConfig, dtype: torch.dtype, token_ids: dict[str, int | None]) -> dict[str, Any]:
    """A `config.json` with the keys of both old and new versions of `transformers`."""
    name = str(dtype).removeprefix("torch.")
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": MODEL_TYPE,
        **{key: getattr(config, key) for key in (*SHAPE_KEYS, *OTHER_KEYS)},
        **FIXED_KEYS,
        **dict.fromkeys(DROPOUT_KEYS, 0.0),
        "rotary_pct": config.rotary_pct,
        "rotary_emb_base": config.rotary_emb_base,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config.rotary_emb_base,
            "partial_rotary_factor": config.rotary_pct,
        },
        "torch_dtype": name,
        "dtype": name,
        "use_cache": True,
        **token_ids,
    }


def import_names(weights: dict[str, Tensor], expected: dict[str, torch.Size], where: str) -> dict[str, Tensor]:
    """Rename weights to New-LLM's names and check that they match the `expected` shapes; old buffers are dropped.

    Raises:
        UserError: weights are missing, unknown, of the wrong shape or not floating-point.
    """
    named: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        ours = HEAD if name in (HEAD, OTHER_HEAD) else name.removeprefix(PREFIX)
        if OLD_BUFFERS.fullmatch(ours):
            continue
        if ours in named:
            raise UserError(f"{where}: duplicate weight {ours}")
        named[ours] = tensor
    tied = None if HEAD in expected else named.pop(HEAD, None)  # some versions also write a tied head
    if tied is not None and not torch.equal(tied, named.get(EMBEDDING, tied)):
        raise UserError(f"{where}: tie_word_embeddings is true, but {HEAD} differs from {EMBEDDING}")
    for what, names in (("missing", set(expected) - set(named)), ("not GPT-NeoX's", set(named) - set(expected))):
        if names:
            more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
            raise UserError(f"{where}: weights {what}: {', '.join(sorted(names)[:MAX_NAMES])}{more}")
    for name, tensor in named.items():
        if tensor.shape != expected[name]:
            raise UserError(
                f"{where}: {name} has shape {tuple(tensor.shape)}, but the configuration says {tuple(expected[name])}"
            )
        if not tensor.is_floating_point():
            raise UserError(f"{where}: {name} has dtype {tensor.dtype}; quantized weights can't be read")
    return named


# Importing and exporting models


def load_pythia(
    name_or_directory: str | Path,
    revision: str | None = None,
    *,
    segment_length: int | None = None,
    replace_layers: Mapping[int, LayerChoice] | None = None,
) -> TransformerLM:
    """Load a GPT-NeoX checkpoint as a model, in the precision it is stored in.

    Args:
        name_or_directory: a directory written by any version of `transformers` or by `export_pythia`, or a hub name
            such as EleutherAI/pythia-70m.
        revision: branch, tag or commit of the hub repository; ignored for a directory.
        segment_length: S, the number of tokens in a segment; None: the checkpoint's max_position_embeddings.
        replace_layers: layers to replace, by index: a kind ("infini"), a kind with options
            ({"kind": "infini", "num_memory_heads": 8}) or a layer. The new layer takes over the old weights that fit,
            see `copy_weights`; its gates have their usual initial values.

    Raises:
        UserError: there is no such checkpoint, the hub can't be reached, or the architecture is not supported.
        ValueError: the segment length or the index of a layer to replace is out of range.
    """
    folder = find_checkpoint(name_or_directory, revision)
    try:
        config = parse_config(read_config(folder), str(folder / CONFIG_FILE))
    except UserError as error:
        raise UserError(shorten(str(error))) from None
    found = read_weights(folder)
    try:
        with torch.device("meta"):  # do not draw weights that the checkpoint replaces
            model = create_model("pythia", config, segment_length=segment_length)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:  # an odd number of rotated dimensions
        raise UserError(shorten(f"{folder / CONFIG_FILE}: {error}")) from None
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    weights = import_names(found, shapes, str(folder))
    check_finite(weights, str(folder))
    model.load_state_dict(weights, assign=True)
    # A model has a single dtype: if the checkpoint has several, use one that can hold all values.
    model.to(functools.reduce(torch.promote_types, {tensor.dtype for tensor in weights.values()}))
    if replace_layers:
        model.layers = nn.ModuleList(swap_layers(model.layer_list, replace_layers, config))
        model.reset_memory()
    return model


def export_pythia(
    model: TransformerLM,
    directory: str | Path,
    tokenizer: Union[Tokenizer, "PreTrainedTokenizerBase", None] = None,
) -> None:
    """Write a plain Pythia as a GPT-NeoX folder that every version of `transformers` can load.

    `max_position_embeddings` is set to the segment length, since GPT-NeoX has no segments and would give different
    logits beyond it.

    Args:
        model: a model of Pythia layers only.
        directory: where to write; weights already there are replaced.
        tokenizer: saved with the model, with its special tokens; None: no tokenizer is saved, and token 0 ends a text.

    Raises:
        UserError: GPT-NeoX can't represent the model.
        OSError: the folder can't be written.
    """
    config = describe_pythia(model)
    with stage_folder(directory, tokenizer, max_length=config.max_position_embeddings, vocab_size=model.vocab_size) as (
        folder,
        token_ids,
    ):
        weights = {name if name == HEAD else PREFIX + name: t.cpu() for name, t in model.state_dict().items()}
        save_torch_state_dict(weights, folder, metadata={"format": "pt"})
        GenerationConfig(**token_ids).save_pretrained(str(folder))
        values = write_config(config, model.embed_in.weight.dtype, token_ids)
        (folder / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def describe_pythia(model: TransformerLM) -> PythiaConfig:
    """The shape of a model that consists of Pythia layers.

    Raises:
        UserError: GPT-NeoX can't represent the model: it has layers of other kinds, layers that differ, or several
            passes. The message says how to save it instead.
    """
    other = (
        "save it with new_llm.models.hf.NewLLMForCausalLM.from_model(model).save_pretrained(directory), or with "
        "`new-llm export --format auto`"
    )
    layers = model.layer_list
    if foreign := [f"{i} ({type(layer).__name__})" for i, layer in enumerate(layers) if type(layer) is not PythiaLayer]:
        raise UserError(f"GPT-NeoX has no layers like {', '.join(foreign)}: {other}")
    if skip_interval := getattr(model, "skip_interval", 0):
        raise UserError(f"GPT-NeoX runs its layers once, but this model runs them {1 + skip_interval} times: {other}")
    settings = dict(layers[0].settings)
    if any(layer.settings != settings for layer in layers):
        raise UserError(f"GPT-NeoX's layers are all alike, but this model's differ: {other}")
    if settings["layer_norm_eps"] != model.final_layer_norm.eps:
        raise UserError(f"GPT-NeoX has one layer_norm_eps, but this model's final LayerNorm has another: {other}")
    return PythiaConfig(
        vocab_size=model.vocab_size,
        num_hidden_layers=len(layers),
        num_attention_heads=settings.pop("num_heads"),
        max_position_embeddings=model.segment_length,
        initializer_range=model.initializer_range,
        tie_word_embeddings=model.tie_word_embeddings,
        **settings,
    )


# Replacing layers by other kinds, which take over the weights that fit


def swap_layers(layers: list[Layer], choices: Mapping[int, LayerChoice], config: PythiaConfig) -> list[Layer]:
    """Replace some layers by other kinds, which take over the weights that fit; see `copy_weights`.

    Raises:
        ValueError: there is no layer with that index, a kind or option is unknown, a layer has another hidden size, or
            a layer that stands before the head is followed by one that does not.
    """
    for index in choices:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(layers):
            raise ValueError(f"replace_layers: no layer {index!r}; the model has 0 to {len(layers) - 1}")
    chosen = {index: make_layer(choice, config, index) for index, choice in choices.items()}
    swapped = [chosen.get(index, layer) for index, layer in enumerate(layers)]
    check_order(swapped)
    for index, layer in chosen.items():
        initialize_weights(layer, config.initializer_range)
        reference = next(layers[index].parameters())
        copy_weights(layers[index], layer.to(reference.device, reference.dtype))
    return swapped


def make_layer(choice: LayerChoice, config: PythiaConfig, index: int) -> Layer:
    """Build the chosen layer; its sizes, heads, rotary settings and ε are the checkpoint's unless given as options."""
    where = f"replace_layers, layer {index}"
    if isinstance(choice, Layer):
        if choice.hidden_size != config.hidden_size:
            raise ValueError(f"{where}: hidden size {choice.hidden_size}, but the checkpoint's is {config.hidden_size}")
        return choice
    options = {"kind": choice} if isinstance(choice, str) else dict(choice)
    kind = options.pop("kind", None)
    if kind not in LAYER_KINDS:
        raise ValueError(f"{where}: unknown kind {kind!r}; allowed are {', '.join(LAYER_KINDS)}")
    try:
        return build_layer(LAYER_KINDS[kind], config, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


@torch.no_grad()
def copy_weights(old: Layer, new: Layer) -> None:
    """Copy one layer's weights to another of any kind, wherever name and shape agree.

    LayerNorms, MLP and output projection are copied unchanged. The rows of the fused projection are ordered by head,
    and within a head by q, k and v. If the new layer has another number of heads they are reordered, so that all
    outputs of q (of k, of v) stay what they were, in the same order over all heads.
    """
    theirs, attentions = old.state_dict(), [layer.get_submodule("attention") for layer in (old, new)]
    heads: list[Any] = [getattr(one, "num_memory_heads", getattr(one, "num_heads", None)) for one in attentions]
    for name, mine in new.state_dict().items():
        if name.startswith("base_layer."):  # the new layer contains the old one unchanged
            mine.copy_(theirs[name.removeprefix("base_layer.")])
            continue
        value = theirs.get(name)
        if value is None or value.shape != mine.shape:
            continue
        if name.startswith(FUSED):
            if None in heads:
                continue  # unknown how the new layer splits it into heads
            value = split_heads_anew(value, *heads)
        mine.copy_(value)


def split_heads_anew(fused: Tensor, old_heads: int, new_heads: int) -> Tensor:
    """Reorder the rows [heads · (q, k, v) · K, ...] of a fused projection for another number of heads."""
    if old_heads == new_heads:
        return fused
    rest = fused.shape[1:]
    whole = fused.unflatten(0, (old_heads, 3, -1)).transpose(0, 1).reshape(3, -1, *rest)  # all of q, then k, then v
    return whole.unflatten(1, (new_heads, -1)).transpose(0, 1).reshape(-1, *rest)
