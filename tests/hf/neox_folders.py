"""GPT-NeoX models of `transformers` and folders of them, written by hand in the layouts of old and new versions."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from model_cases import randomize

SHAPE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "layer_norm_eps": 1e-4,
    "initializer_range": 0.03,
}
ROTARY = {"rotary_pct": 0.5, "rotary_emb_base": 500}  # not the defaults, which a reader could fall back to
OLD_CONFIG: dict[str, Any] = {
    **SHAPE,
    **ROTARY,
    "architectures": ["GPTNeoXForCausalLM"],
    "model_type": "gpt_neox",
    "hidden_act": "gelu",
    "bos_token_id": 0,
    "eos_token_id": 0,
    "tie_word_embeddings": False,
    "use_parallel_residual": True,
    "torch_dtype": "float16",
    "transformers_version": "4.24.0",
}
NEW_CONFIG: dict[str, Any] = {
    **{key: value for key, value in OLD_CONFIG.items() if key not in (*ROTARY, "torch_dtype")},
    "attention_bias": True,
    "attention_dropout": 0.0,
    "dtype": "float16",
    "rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 500, "rope_type": "default"},
    "transformers_version": "5.0.0",
}


def make_neox(seed: int = 3, **changes: Any) -> GPTNeoXForCausalLM:
    """Hugging Face's model with random weights, biases and norms."""
    config = GPTNeoXConfig(**{**SHAPE, **ROTARY, "hidden_act": "gelu", "tie_word_embeddings": False, **changes})
    model = GPTNeoXForCausalLM(config)
    randomize(model, seed)
    return model.eval()


def disk_weights(model: GPTNeoXForCausalLM, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The weights by the names that all versions write to disk."""
    return {
        name.replace("lm_head", "embed_out"): value.to(dtype).clone()
        for name, value in model.state_dict().items()
        if not name.endswith("inv_freq")
    }


def old_buffers() -> dict[str, Tensor]:
    """The constants that versions of 2022 stored beside the weights."""
    buffers: dict[str, Tensor] = {}
    for layer in range(SHAPE["num_hidden_layers"]):
        prefix = f"gpt_neox.layers.{layer}.attention."
        buffers[prefix + "bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
        buffers[prefix + "masked_bias"] = torch.tensor(-1e9)
        buffers[prefix + "rotary_emb.inv_freq"] = torch.rand(2)
    return buffers


def write_folder(folder: Path, config: dict[str, Any], weights: dict[str, Tensor], kind: str = "safetensors") -> Path:
    """Write a checkpoint: kind is safetensors, bin, safetensors-sharded or bin-sharded."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    ending, is_sharded = kind.removesuffix("-sharded"), kind.endswith("-sharded")
    stem = "model" if ending == "safetensors" else "pytorch_model"
    names = sorted(weights)
    parts = [names[:7], names[7:]] if is_sharded else [names]
    places: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        file = f"{stem}-0000{number}-of-00002.{ending}" if is_sharded else f"{stem}.{ending}"
        chosen = {name: weights[name].contiguous() for name in part}
        if ending == "safetensors":
            save_file(chosen, folder / file, metadata={"format": "pt"})
        else:
            torch.save(chosen, folder / file)
        places |= dict.fromkeys(part, file)
    if is_sharded:
        index = {"metadata": {"total_size": 0}, "weight_map": places}
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
    return folder
