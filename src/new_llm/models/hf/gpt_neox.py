"""GPT-NeoX's layouts, of old and of new `transformers`: the configuration's keys and the weights' names.

| | up to version 4 | from version 5 | here, in memory |
|---|---|---|---|
| rotary share and base | `rotary_pct`, `rotary_emb_base` | `rope_parameters` | `PythiaConfig` |
| head in memory | `embed_out` | `lm_head` | `embed_out` |
| head on disk | `embed_out.weight` | `embed_out.weight` | |
"""

import re
import warnings
from typing import Any

import torch
from torch import Tensor

from new_llm.config import PythiaConfig, UserError

MODEL_TYPE = "gpt_neox"
PREFIX = "gpt_neox."
HEAD = "embed_out.weight"
OTHER_HEAD = "lm_head.weight"
OLD_BUFFERS = re.compile(r"(layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\..+)|rotary_emb\..+)")
"""Constants that older versions of `transformers` stored with the weights."""
SHAPE_KEYS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
OTHER_KEYS = ("max_position_embeddings", "layer_norm_eps", "initializer_range")
FIXED_KEYS: dict[str, Any] = {
    "hidden_act": "gelu",
    "use_parallel_residual": True,
    "attention_bias": True,
    "tie_word_embeddings": False,
}
"""What every Pythia has, which our layers are built for; a key that is missing means this value."""
DROPOUT_KEYS = ("attention_dropout", "hidden_dropout")
MAX_NAMES = 5  # of weights in an error


def parse_config(values: dict[str, Any], where: str) -> PythiaConfig:
    """The shape that a GPT-NeoX `config.json` describes, in the layout of any version.

    Raises:
        UserError: another model type, a key that is missing, or an option that our layers don't have.
    """
    found = values.get("model_type")
    if found != MODEL_TYPE:
        hint = "; AutoModelForCausalLM.from_pretrained loads it" if found == "new_llm" else ""
        raise UserError(f"{where}: model_type {found!r}; only {MODEL_TYPE!r} (Pythia, GPT-NeoX) can be read{hint}")
    if missing := [key for key in SHAPE_KEYS if values.get(key) is None]:
        raise UserError(f"{where}: {', '.join(missing)} missing")
    for key, allowed in FIXED_KEYS.items():
        if values.get(key, allowed) != allowed:
            raise UserError(f"{where}: {key} is {values[key]!r}; Pythia layers have {allowed!r} and no other")
    if dropped := [key for key in DROPOUT_KEYS if values.get(key)]:
        warnings.warn(f"{where}: {', '.join(dropped)}: our layers have no dropout, in training too", stacklevel=3)
    given = {key: values[key] for key in (*SHAPE_KEYS, *OTHER_KEYS) if values.get(key) is not None}
    try:
        return PythiaConfig(**given, **_parse_rotary(values))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _parse_rotary(values: dict[str, Any]) -> dict[str, Any]:
    """`rotary_pct` and `rotary_emb_base`; where both layouts are there, the new one holds."""
    for key in ("rope_parameters", "rope_scaling"):
        rope = values.get(key) or {}
        if not isinstance(rope, dict):
            raise UserError(f"{key} is no mapping")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise UserError(f"{key} of type {kind!r}; Pythia layers have plain rotary positions ('default')")
    rope = values.get("rope_parameters") or {}
    names = {
        "rotary_pct": (
            rope.get("partial_rotary_factor"),
            values.get("rotary_pct"),
            values.get("partial_rotary_factor"),
        ),
        "rotary_emb_base": (rope.get("rope_theta"), values.get("rotary_emb_base"), values.get("rope_theta")),
    }
    given = {name: next((value for value in found if value is not None), None) for name, found in names.items()}
    return {name: value for name, value in given.items() if value is not None}


def write_config(config: PythiaConfig, dtype: torch.dtype, token_ids: dict[str, int | None]) -> dict[str, Any]:
    """A `config.json` that old and new versions of `transformers` read alike: it has the keys of both.

    Args:
        config: the shape.
        dtype: the weights'.
        token_ids: bos_token_id, eos_token_id, pad_token_id.
    """
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
    """Weights by our names, all there and of the right shape; old buffers are left out.

    Args:
        weights: by GPT-NeoX's names.
        expected: shapes by our names.
        where: the checkpoint, for errors.

    Raises:
        UserError: weights that are missing, unknown or of another shape, or of no floating-point type.
    """
    named: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        ours = HEAD if name in (HEAD, OTHER_HEAD) else name.removeprefix(PREFIX)
        if OLD_BUFFERS.fullmatch(ours):
            continue
        if ours in named:
            raise UserError(f"{where}: {ours} is there twice")
        named[ours] = tensor
    for what, names in (("missing", set(expected) - set(named)), ("not GPT-NeoX's", set(named) - set(expected))):
        if names:
            more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
            raise UserError(f"{where}: weights {what}: {', '.join(sorted(names)[:MAX_NAMES])}{more}")
    for name, tensor in named.items():
        if tensor.shape != expected[name]:
            raise UserError(
                f"{where}: {name} has shape {tuple(tensor.shape)}, the configuration {tuple(expected[name])}"
            )
        if not tensor.is_floating_point():
            raise UserError(f"{where}: {name} has dtype {tensor.dtype}; quantized weights can't be read")
    return named


def export_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights by the names that every version of `transformers` writes to disk."""
    return {name if name == HEAD else PREFIX + name: tensor.detach().cpu() for name, tensor in weights.items()}
