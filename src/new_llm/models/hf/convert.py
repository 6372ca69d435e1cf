"""Pythia in and out: GPT-NeoX checkpoints of any version of `transformers` to our model, and back."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Union

import torch
from huggingface_hub import save_torch_state_dict
from tokenizers import Tokenizer

from new_llm.config import PythiaConfig, UserError
from new_llm.config.files import shorten
from new_llm.models.hf.checkpoint import CONFIG_FILE, find_checkpoint, read_config, read_weights
from new_llm.models.hf.folder import (
    find_token_ids,
    stage_folder,
    wrap_tokenizer,
    write_generation_config,
    write_tokenizer,
)
from new_llm.models.hf.gpt_neox import HEAD, export_names, import_names, parse_config, write_config
from new_llm.models.hf.replacement import LayerChoice, swap_layers
from new_llm.models.layers import Layer, PythiaLayer, build_layer
from new_llm.models.tensor_files import check_finite
from new_llm.models.transformer import TransformerLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_pythia(
    name_or_directory: str | Path,
    revision: str | None = None,
    *,
    segment_length: int | None = None,
    replace_layers: Mapping[int, LayerChoice] | None = None,
) -> TransformerLM:
    """Make a model from a GPT-NeoX checkpoint, in the precision it is stored in: `load_pythia`.

    Args:
        name_or_directory: a directory that any version of `transformers`, or `export_pythia`, has written, or a hub
            name such as EleutherAI/pythia-70m.
        revision: branch, tag or commit of the hub repository; a directory has none.
        segment_length: tokens S in a segment; None: the checkpoint's max_position_embeddings.
        replace_layers: layers to swap, by their index: a kind ("infini"), a kind with options
            ({"kind": "infini", "num_memory_heads": 8}) or a layer. A swapped layer takes over what fits, see
            `replacement.take_over_weights`; its gates begin as the kind's do.

    Raises:
        UserError: no such checkpoint, a hub out of reach, or an architecture that our layers can't represent.
        ValueError: a segment length or a layer to swap that is out of range.
    """
    folder = find_checkpoint(name_or_directory, revision)
    try:
        config = parse_config(read_config(folder), str(folder / CONFIG_FILE))
    except UserError as error:
        raise UserError(shorten(str(error))) from None
    length = config.max_position_embeddings if segment_length is None else segment_length
    if not 1 <= length <= config.max_position_embeddings:
        raise ValueError(
            f"segment_length: {length} is out of range; allowed are 1 to max_position_embeddings "
            f"({config.max_position_embeddings})"
        )
    found = read_weights(folder)
    if config.num_hidden_layers > len(found):
        raise UserError(
            f"{folder / CONFIG_FILE}: {config.num_hidden_layers:,} layers, but the weights are {len(found):,} tensors"
        )
    with torch.device("meta"):  # nothing is drawn that the checkpoint replaces
        try:
            layers: list[Layer] = [build_layer(PythiaLayer, config) for _ in range(config.num_hidden_layers)]
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:  # an odd number of rotated dimensions
            raise UserError(shorten(f"{folder / CONFIG_FILE}: {error}")) from None
        model = TransformerLM(layers, config.vocab_size, length, layer_norm_eps=config.layer_norm_eps)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    weights = import_names(found, shapes, str(folder))
    check_finite(weights, str(folder))
    model.load_state_dict(weights, assign=True)
    # A model computes in one precision: where a checkpoint has several, in one that holds all values.
    model.to(functools.reduce(torch.promote_types, {tensor.dtype for tensor in weights.values()}))
    if replace_layers:
        model.layers = torch.nn.ModuleList(swap_layers(model.layer_list, replace_layers, config))
        model.reset_memory()
    return model


def export_pythia(
    model: TransformerLM,
    directory: str | Path,
    tokenizer: Union[Tokenizer, "PreTrainedTokenizerBase", None] = None,
) -> None:
    """Write a plain Pythia as a GPT-NeoX folder that every version of `transformers` loads.

    `max_position_embeddings` is the segment's length: beyond it the two would differ, since GPT-NeoX has no segments.

    Args:
        model: a model of Pythia layers.
        directory: where to write; weights that stand there are replaced.
        tokenizer: written beside the model, with its special tokens; None: none, and token 0 ends a text.

    Raises:
        UserError: a model that GPT-NeoX can't express, or a folder that can't be written.
    """
    config = describe_pythia(model)
    directory = Path(directory).expanduser()
    wrapped = None if tokenizer is None else wrap_tokenizer(tokenizer, config.max_position_embeddings)
    token_ids = find_token_ids(wrapped)
    weights = model.state_dict()
    if model.tie_word_embeddings:  # written as two equal weights
        weights[HEAD] = model.embed_in.weight.detach().clone()
    with stage_folder(directory) as folder:
        save_torch_state_dict(export_names(weights), folder, metadata={"format": "pt"})
        write_generation_config(token_ids, folder)
        if wrapped is not None:
            write_tokenizer(wrapped, folder)
        values = write_config(config, model.embed_in.weight.dtype, token_ids)
        (folder / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def describe_pythia(model: TransformerLM) -> PythiaConfig:
    """The shape of a model of Pythia layers.

    Raises:
        UserError: memory layers or other kinds, layers that differ, or several passes: names what saves such a model.
    """
    other = (
        "save it by new_llm.models.hf.NewLLMForCausalLM.from_model(model).save_pretrained(directory), or by "
        "`new-llm export --format auto`"
    )
    layers = model.layer_list
    if foreign := [f"{i} ({type(layer).__name__})" for i, layer in enumerate(layers) if type(layer) is not PythiaLayer]:
        raise UserError(f"GPT-NeoX has no layers like {', '.join(foreign)}: {other}")
    if skip_interval := getattr(model, "skip_interval", 0):
        raise UserError(f"GPT-NeoX runs its layers once, this model {1 + skip_interval} times: {other}")
    settings = layers[0].settings
    if any(layer.settings != settings for layer in layers):
        raise UserError(f"GPT-NeoX's layers are all alike, this model's differ: {other}")
    if settings["layer_norm_eps"] != model.final_layer_norm.eps:
        raise UserError(f"GPT-NeoX has one layer_norm_eps, this model's final LayerNorm another: {other}")
    return PythiaConfig(
        vocab_size=model.vocab_size,
        hidden_size=settings["hidden_size"],
        num_hidden_layers=len(layers),
        num_attention_heads=settings["num_heads"],
        intermediate_size=settings["intermediate_size"],
        max_position_embeddings=model.segment_length,
        rotary_pct=settings["rotary_pct"],
        rotary_emb_base=settings["rotary_emb_base"],
        layer_norm_eps=settings["layer_norm_eps"],
    )
