"""Hugging Face integration: importing and exporting Pythia, and every model as a `transformers` model.

Importing this package registers the model type `new_llm` with `AutoConfig`, `AutoModelForCausalLM` and `AutoTokenizer`.
No code from a model's folder is ever run.
"""

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from new_llm.models.hf.auto import NewLLMConfig, NewLLMForCausalLM, StreamCache, export_auto
from new_llm.models.hf.gpt_neox import export_pythia, load_pythia

AutoConfig.register(NewLLMConfig.model_type, NewLLMConfig, exist_ok=True)
AutoModelForCausalLM.register(NewLLMConfig, NewLLMForCausalLM, exist_ok=True)
AutoTokenizer.register(NewLLMConfig, fast_tokenizer_class=PreTrainedTokenizerFast, exist_ok=True)

__all__ = ["NewLLMConfig", "NewLLMForCausalLM", "StreamCache", "export_auto", "export_pythia", "load_pythia"]
