"""Every model as a `transformers` model, for `AutoModelForCausalLM`, `generate()`, `Trainer` and `peft`."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union, cast

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from new_llm.config import PythiaConfig, UserError
from new_llm.models.hf.folder import stage_folder
from new_llm.models.inputs import IGNORE_INDEX, compute_token_losses
from new_llm.models.layers.base import initialize_weights
from new_llm.models.model_file import FORMAT_VERSION, ModelStructure, build_model, describe_model
from new_llm.models.state import map_tensors
from new_llm.models.stream import MemoryStream
from new_llm.models.transformer import TransformerLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class NewLLMConfig(PretrainedConfig):
    """The configuration of `NewLLMForCausalLM`.

    Args:
        layers: the layers, each `{"kind": "infini", ...}` with the constructor arguments of a registered layer class.
        vocab_size: number of rows of the embedding and the head.
        selective: options of a selective model; None: a single pass.
        max_position_embeddings: number of tokens that tools may pass in one call. The model itself has no limit, since
            positions restart in every segment and memory carries the rest. None: a Pythia's 2048, or the segment length
            if that is longer, so that models with different segments are evaluated on the same texts.
        use_cache: whether to return a cache if no gradients are recorded.
        kwargs: other arguments of `PretrainedConfig`.
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
        tie_word_embeddings: bool = False,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
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
        super().__init__(**{**kwargs, "tie_word_embeddings": tie_word_embeddings})

    @classmethod
    def from_model(cls, model: TransformerLM, **kwargs: Any) -> "NewLLMConfig":
        """The configuration of a model; `kwargs` are arguments that do not follow from it, such as eos_token_id."""
        return cls(**{**describe_model(model), **kwargs})

    @property
    def structure(self) -> dict[str, Any]:
        """The structure from which `model_file.build_model` builds the model."""
        return {name: getattr(self, name) for name in ModelStructure.__dataclass_fields__}

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def hidden_size(self) -> int | None:
        """D; None if there are no layers, or the first has no such setting."""
        return self.layers[0].get("hidden_size") if self.layers else None


class StreamCache(Cache):
    """What a model has read so far, in a `MemoryStream` that starts from the held memory.

    Its size is bounded however long the text is. Rows can be selected and repeated (for beam search), and the cache can
    be copied (`copy.deepcopy`, for several continuations of one prompt). It can't be cropped: a memory can't forget its
    last tokens.
    """

    is_compileable = False  # pyright: ignore
    is_croppable = False  # pyright: ignore

    def __init__(self, model: TransformerLM, batch_size: int) -> None:
        if issubclass(Cache, nn.Module):  # up to transformers 4.48
            super().__init__()
        self.layers = []
        self.stream = MemoryStream(model, batch_size)
        self.num_columns = 0
        self.last_hidden: Tensor | None = None

    def feed(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Read the next columns, [B, T]; returns hidden states [B, T, D]; padding repeats the last real token's."""
        hidden = self.stream.feed_hidden(input_ids, attention_mask)
        hidden = hold_over_padding(hidden, attention_mask, self.last_hidden)
        self.last_hidden = hidden[:, -1]
        self.num_columns += input_ids.shape[1]
        return hidden

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of columns read, including padding."""
        return self.num_columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no maximum length."""
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int | None:
        """None: there is no maximum length."""
        return None

    @property
    def batch_size(self) -> int:
        """Number of rows B."""
        return self.stream.batch_size

    @property
    def is_initialized(self) -> bool:
        """Whether anything has been read."""
        return self.num_columns > 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i continue from what row `beam_idx[i]` has read."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows with these indices, in this order; an index may occur several times."""
        self.stream = select_stream_rows(self.stream, indices)
        if self.last_hidden is not None:
            self.last_hidden = self.last_hidden.index_select(0, indices.to(self.last_hidden.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Replace each row by `repeats` adjacent copies."""
        self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def reset(self) -> None:
        """Start again from the model's held memory."""
        self.__init__(self.stream.model, self.batch_size)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Not supported: what has been written to a memory can't be removed."""
        raise ValueError("the cache of a memory model can't be shortened; copy it before the tokens are read")

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Not supported: only the model's own layers write the cache."""
        raise ValueError("StreamCache can't take keys and values of other layers; pass it as past_key_values")

    def __deepcopy__(self, memo: dict[int, Any]) -> "StreamCache":
        """An independent copy, with the same model."""
        copied = StreamCache(self.stream.model, self.batch_size)
        copied.num_columns, copied.last_hidden = self.num_columns, self.last_hidden
        copied.stream = select_stream_rows(self.stream, torch.arange(self.batch_size))
        return copied


def hold_over_padding(hidden: Tensor, attention_mask: Tensor | None, before: Tensor | None = None) -> Tensor:
    """Replace hidden states [B, T, D] at padding by those of the last real token before it, or by `before` [B, D].

    `transformers` generates from the last column, which is padding if prompts are padded on the right.
    """
    if attention_mask is None or bool(attention_mask[:, -1].all()):
        return hidden
    before = torch.zeros_like(hidden[:, 0]) if before is None else before
    columns = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)
    last = torch.where(attention_mask.to(hidden.device, torch.bool), columns, 0).cummax(dim=1).values
    held = torch.cat((before.unsqueeze(1), hidden), dim=1)
    return held.gather(1, last.unsqueeze(-1).expand(-1, -1, hidden.shape[2]))


def select_stream_rows(stream: MemoryStream, indices: Tensor) -> MemoryStream:
    """A new stream with copies of some rows of another, which is not changed."""
    selected, copies = copy.copy(stream), dict[int, Tensor]()

    def pick(t: Tensor) -> Tensor:  # a tensor used twice must stay one tensor, since layers change it in place
        if id(t) not in copies:
            copies[id(t)] = t.index_select(0, indices.to(t.device)) if t.dim() else t.clone()
        return copies[id(t)]

    selected.batch_size = len(indices)
    for name in ("memories", "opened"):
        setattr(selected, name, map_tensors(getattr(stream, name), pick))
    for name in ("offsets", "num_tokens"):
        setattr(selected, name, [getattr(stream, name)[row] for row in indices.tolist()])
    return selected


UNSUPPORTED = ("inputs_embeds", "output_attentions", "output_hidden_states")
"""Arguments of other `transformers` models that are not supported."""


class NewLLMForCausalLM(PreTrainedModel, GenerationMixin):
    """A `TransformerLM` as a `transformers` model; a new one is built unless `model` is given.

    The attribute `model` is the `TransformerLM` itself, with its memory: after `load_memory_file(hf.model, path)`,
    `hf.generate(...)` starts every row from that memory. `save_pretrained` does not save the memory.
    """

    config_class = NewLLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_cache_class = True  # read by transformers up to 4.55
    _is_stateful = True  # no assisted generation: a cache can't be shortened

    def __init__(self, config: NewLLMConfig, model: TransformerLM | None = None) -> None:
        super().__init__(config)
        if model is None:
            model = build_model(config.structure, "the model's configuration")
        else:
            for module in model.modules():
                module._is_hf_initialized = True  # pyright: ignore[reportArgumentType]
        self.model = model
        # Memory and streams are on a single device, so device_map must not split the model.
        self._no_split_modules = [type(model).__name__]
        self.post_init()

    @classmethod
    def from_model(cls, model: TransformerLM, **kwargs: Any) -> "NewLLMForCausalLM":
        """Wrap a model of registered layers without copying it; `kwargs` go to `NewLLMConfig`."""
        dtype = {"torch_dtype": model.embed_in.weight.dtype}
        return cls(NewLLMConfig.from_model(model, **(dtype | kwargs)), model).train(model.training)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """See `PreTrainedModel.from_pretrained`; missing weights are a `UserError` instead of being drawn at random."""
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        if missing := sorted(info["missing_keys"]):
            raise UserError(f"{args[0] if args else 'from_pretrained'}: weights are missing: {', '.join(missing)}")
        return (model, info) if output_loading_info else model

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """See `PreTrainedModel.save_pretrained`; a head that an adapter has untied from the embedding stays untied."""
        self.config.tie_word_embeddings = self.model.tie_word_embeddings
        super().save_pretrained(*args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        if hasattr(module, "initialize_features"):  # called after its parts were initialised
            cast(Any, module).initialize_features()
        elif not any(True for _ in module.children()):
            initialize_weights(module, self.config.initializer_range)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` makes the cache

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.model.embed_in

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the embedding; its number of rows becomes the vocabulary size."""
        self.model.embed_in = value
        self.model.vocab_size = value.num_embeddings

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.model.embed_out

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """Replace the head."""
        self.model.embed_out = new_embeddings

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Tie head and embedding again, if configured; `transformers` calls this after loading and resizing."""
        if self.config.tie_word_embeddings:
            self.model.tie_embeddings()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: StreamCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        *,
        update_memory: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The logits, and with labels the loss.

        Args:
            input_ids: [B, T]; with a cache, the tokens after those that it has read.
            attention_mask: [B, T], optionally preceded by the columns that the cache has read; tokens with 0 are
                neither read nor written.
            position_ids: ignored: positions count within a segment, and masked tokens take none.
            past_key_values: the cache that an earlier call returned; records no gradients.
            labels: the tokens themselves, not shifted, [B, T]; see `align_labels`.
            use_cache: whether to return a cache; None: as configured. There is never one with labels or gradients.
            logits_to_keep: number of last columns, or indices of the columns, whose logits to return; 0: all. Ignored
                with labels.
            num_items_in_batch: divisor of the summed loss, which `Trainer` passes for accumulated batches; None: the
                number of predicted tokens.
            return_dict: False: return a tuple.
            update_memory: keep what the call wrote in the held memory, see `TransformerLM.forward`; not with a cache.
            kwargs: arguments of other models; those in `UNSUPPORTED` must be unset.

        Raises:
            ValueError: see `TransformerLM.forward`; or an argument is not supported.
        """
        if unknown := [name for name in UNSUPPORTED if kwargs.get(name) not in (None, False)]:
            raise ValueError(f"{', '.join(unknown)}: not supported by {type(self).__name__}")
        if attention_mask is not None and past_key_values is not None:
            attention_mask = attention_mask[:, -input_ids.shape[1] :]
        if use_cache is None:
            use_cache = self.config.use_cache
        cache = past_key_values
        if cache is None and use_cache and labels is None and not torch.is_grad_enabled() and not update_memory:
            cache = StreamCache(self.model, len(input_ids))
        if cache is not None and update_memory:
            raise ValueError("update_memory: not possible in a call with a cache; leave out past_key_values")
        if cache is not None:
            passes = [cache.feed(input_ids, attention_mask)]
        else:
            passes = self.model.compute_passes(input_ids, attention_mask, update_memory=update_memory)
        hidden = passes[-1] if cache is not None else hold_over_padding(passes[-1], attention_mask)
        loss = None
        if labels is None:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.model.embed_out(hidden[:, kept])
        else:
            logits = self.model.embed_out(hidden)
            loss = self._average_loss(passes, logits, input_ids, labels, attention_mask, num_items_in_batch)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
        wants_tuple = return_dict is False or (return_dict is None and not getattr(self.config, "return_dict", True))
        return output.to_tuple() if wants_tuple else output

    def _average_loss(
        self,
        passes: list[Tensor],
        logits: Tensor,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None,
        num_items: Tensor | int | None,
    ) -> Tensor:
        """The summed loss divided by `num_items`, or by the number of predicted tokens (NaN if there are none)."""
        targets = self.model.find_targets(input_ids, labels.to(input_ids.device), attention_mask)
        if self.model.training and self.model.selective.earlier_pass_weight:
            total = self.model.score_passes(passes, targets, "sum")  # a weighted mean over all passes
        else:
            total = compute_token_losses(logits.flatten(0, 1), targets.flatten()).sum()
        total = self.model.add_auxiliary_loss(total, targets)
        if num_items is None:
            num_items = (targets != IGNORE_INDEX).sum()
        return total / (num_items.to(total.device) if isinstance(num_items, Tensor) else num_items)


def export_auto(
    model: TransformerLM,
    directory: str | Path,
    tokenizer: Union[Tokenizer, "PreTrainedTokenizerBase", None] = None,
) -> None:
    """Write weights, configuration, generation configuration and tokenizer for `AutoModelForCausalLM`.

    To load the folder, import `new_llm.models.hf` first. The held memory is not saved.

    Args:
        directory: where to write; weights already there are replaced.
        tokenizer: saved with the model, with its special tokens; None: no tokenizer is saved, and token 0 ends a text.

    Raises:
        ValueError: a layer's class is not registered.
        OSError: the folder can't be written.
    """
    hf = NewLLMForCausalLM.from_model(model)
    with stage_folder(
        directory, tokenizer, max_length=hf.config.max_position_embeddings, vocab_size=model.vocab_size
    ) as (folder, token_ids):
        hf.config.update(token_ids)
        hf.generation_config = GenerationConfig(**token_ids)
        hf.save_pretrained(str(folder))
