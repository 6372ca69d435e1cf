"""Any model of the family as a folder that the Auto classes load."""

from pathlib import Path
from typing import TYPE_CHECKING, Union

from tokenizers import Tokenizer
from transformers import GenerationConfig

from new_llm.models.hf.auto import NewLLMForCausalLM
from new_llm.models.hf.folder import find_token_ids, stage_folder, wrap_tokenizer, write_tokenizer
from new_llm.models.transformer import TransformerLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def export_auto(
    model: TransformerLM,
    directory: str | Path,
    tokenizer: Union[Tokenizer, "PreTrainedTokenizerBase", None] = None,
) -> None:
    """Write weights, configuration, generation configuration and tokenizer for `AutoModelForCausalLM`.

    The folder loads wherever `new_llm.models.hf` has been imported. The held memory is not part of it.

    Args:
        model: any model of registered layers.
        directory: where to write; weights that stand there are replaced.
        tokenizer: written beside the model, with its special tokens; None: none, and token 0 ends a text.

    Raises:
        ValueError: a layer of a class that is not registered.
        UserError: the folder can't be written.
    """
    hf = NewLLMForCausalLM.from_model(model)
    wrapped = None if tokenizer is None else wrap_tokenizer(tokenizer, hf.config.max_position_embeddings)
    token_ids = find_token_ids(wrapped)
    hf.config.update(token_ids)
    hf.generation_config = GenerationConfig(**token_ids)
    with stage_folder(Path(directory).expanduser()) as folder:
        hf.save_pretrained(str(folder))
        if wrapped is not None:
            write_tokenizer(wrapped, folder)
