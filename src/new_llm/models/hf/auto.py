"""Every model of the family as a `transformers` model: `AutoModelForCausalLM`, `generate()`, `Trainer`, `peft`."""

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
    """What `NewLLMForCausalLM` is made from.

    Args:
        layers: the layers, each `{"kind": "infini", ...}` with the arguments of a registered layer class.
        vocab_size: rows of the embedding and the head.
        selective: options of a selective model; None: one pass.
        max_position_embeddings: tokens that a tool may give in one call. The model itself has no limit: positions
            restart in every segment and memory carries the rest. None: a Pythia's 2048, or a segment where that is
            longer, so that models cut into different segments are measured on the same texts.
        use_cache: return a cache where no gradients are recorded.
        kwargs: the rest, as in any `PretrainedConfig`.
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
        """The configuration of a model; `kwargs` are the arguments that a model does not know, such as eos_token_id."""
        return cls(**{**describe_model(model), **kwargs})

    @property
    def structure(self) -> dict[str, Any]:
        """What `model_file.build_model` makes the model from."""
        return {name: getattr(self, name) for name in ModelStructure.__dataclass_fields__}

    @property
    def num_hidden_layers(self) -> int:
        """Layers."""
        return len(self.layers)

    @property
    def hidden_size(self) -> int | None:
        """D; None where a layer of another make calls it otherwise."""
        return self.layers[0].get("hidden_size") if self.layers else None


class StreamCache(Cache):
    """What a model has read so far, row by row, of constant size beyond a segment; rows begin with the held memory.

    Rows can be selected and repeated (beam search), and the cache can be copied (`copy.deepcopy`, for several
    continuations of one prompt). It can't be shortened: a memory does not forget its last tokens.
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
        """Hidden states [B, T, D] of the next columns [B, T]; a masked one has those of the last real token before."""
        hidden = self.stream.feed_hidden(input_ids, attention_mask)
        hidden = hold_over_padding(hidden, attention_mask, self.last_hidden)
        self.last_hidden = hidden[:, -1]
        self.num_columns += input_ids.shape[1]
        return hidden

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns read, padding included."""
        return self.num_columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no longest text."""
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int | None:
        """None: there is no longest text."""
        return None

    @property
    def batch_size(self) -> int:
        """Rows B."""
        return self.stream.batch_size

    @property
    def is_initialized(self) -> bool:
        """Whether anything was read."""
        return self.num_columns > 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i continues from what row `beam_idx[i]` has read."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows of these indices, in this order; one may come several times."""
        self.stream = select_stream_rows(self.stream, indices)
        if self.last_hidden is not None:
            self.last_hidden = self.last_hidden.index_select(0, indices.to(self.last_hidden.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Replace each row by this many copies, next to one another."""
        self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def reset(self) -> None:
        """Begin anew from the model's held memory."""
        self.__init__(self.stream.model, self.batch_size)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Refused: what a memory took in can't be taken out again."""
        raise ValueError("the cache of a memory model can't be shortened: copy it before the tokens are read")

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the model's own layers write the cache."""
        raise ValueError("StreamCache holds no keys and values of other layers: pass it as past_key_values")

    def __deepcopy__(self, memo: dict[int, Any]) -> "StreamCache":
        """A copy that reads on by itself, with the same model."""
        copied = StreamCache(self.stream.model, self.batch_size)
        copied.num_columns, copied.last_hidden = self.num_columns, self.last_hidden
        copied.stream = select_stream_rows(self.stream, torch.arange(self.batch_size))
        return copied


def hold_over_padding(hidden: Tensor, attention_mask: Tensor | None, before: Tensor | None = None) -> Tensor:
    """Give masked columns of [B, T, D] the hidden state of the last real token before them, or `before` [B, D].

    Generation continues from the last column, which is padding where prompts are padded on the right.
    """
    if attention_mask is None or bool(attention_mask[:, -1].all()):
        return hidden
    before = torch.zeros_like(hidden[:, 0]) if before is None else before
    columns = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)
    last = torch.where(attention_mask.to(hidden.device, torch.bool), columns, 0).cummax(dim=1).values
    held = torch.cat((before.unsqueeze(1), hidden), dim=1)
    return held.gather(1, last.unsqueeze(-1).expand(-1, -1, hidden.shape[2]))


def select_stream_rows(stream: MemoryStream, indices: Tensor) -> MemoryStream:
    """A stream of copies of some rows of another, which stays as it is."""
    selected, copies = copy.copy(stream), dict[int, Tensor]()

    def pick(t: Tensor) -> Tensor:  # one tensor in two places stays one, since layers write theirs in place
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
"""Arguments of other models that these have no answer to."""


class NewLLMForCausalLM(PreTrainedModel, GenerationMixin):
    """A `TransformerLM` as a `transformers` model, with fresh weights unless one is given to wrap.

    `model` is the `TransformerLM` itself, with its memory: `load_memory_file(hf.model, path)` before `hf.generate(...)`
    begins every row from that memory. Memory is no weight: `save_pretrained` leaves it out.
    """

    config_class = NewLLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_cache_class = True  # asked for up to transformers 4.55
    _is_stateful = True  # no assisted generation: a cache can't be shortened

    def __init__(self, config: NewLLMConfig, model: TransformerLM | None = None) -> None:
        super().__init__(config)
        if model is None:
            model = build_model(config.structure, "the model's configuration")
        else:
            for module in model.modules():
                module._is_hf_initialized = True  # pyright: ignore[reportArgumentType]
        self.model = model
        # One block for device_map: memory and streams live on one device, so a model is placed whole.
        self._no_split_modules = [type(model).__name__]
        self.post_init()

    @classmethod
    def from_model(cls, model: TransformerLM, **kwargs: Any) -> "NewLLMForCausalLM":
        """Wrap a model of registered layers, which is not copied; `kwargs` go to `NewLLMConfig`."""
        dtype = {"torch_dtype": model.embed_in.weight.dtype}
        return cls(NewLLMConfig.from_model(model, **(dtype | kwargs)), model).train(model.training)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in any model of `transformers`; weights that are missing are a `UserError`, never drawn by chance."""
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        if missing := sorted(info["missing_keys"]):
            raise UserError(f"{args[0] if args else 'from_pretrained'}: weights are missing: {', '.join(missing)}")
        return (model, info) if output_loading_info else model

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in any model of `transformers`; a head that an adapter has separated from the embedding stays so."""
        self.config.tie_word_embeddings = self.model.tie_word_embeddings
        super().save_pretrained(*args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        if hasattr(module, "initialize_features"):  # after its parts
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
        """Replace the embedding; its rows are the vocabulary."""
        self.model.embed_in = value
        self.model.vocab_size = value.num_embeddings

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.model.embed_out

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """Replace the head."""
        self.model.embed_out = new_embeddings

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Share one weight between embedding and head again, if so configured; called after loading and resizing."""
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
        """Logits, and the loss where labels are given.

        Args:
            input_ids: [B, T]; with a cache the tokens after those it has read.
            attention_mask: [B, T], or as many columns more as the cache has read; 0: neither read nor written.
            position_ids: not used: positions are those inside a segment, and masked tokens take none.
            past_key_values: what a call before returned. Without gradients.
            labels: the tokens themselves, not shifted, [B, T]; see `align_labels`.
            use_cache: return a cache; None: as configured. None is made with labels, or where gradients are recorded.
            logits_to_keep: logits of this many last columns, or of the columns with these indices; 0: all. With
                labels all are returned.
            num_items_in_batch: what the summed loss is divided by, as `Trainer` gives it over accumulated batches;
                None: the number of predicted tokens.
            return_dict: False: a tuple.
            update_memory: hold what the call wrote, as in `TransformerLM`; without a cache.
            kwargs: arguments of other models, which must be unset.

        Raises:
            ValueError: as `TransformerLM`, or an argument that these models don't know.
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
            raise ValueError("update_memory: a call with a cache holds nothing; leave past_key_values out")
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
        """The summed loss over `num_items`, or over the tokens that are predicted; NaN where there are none."""
        targets = self.model.find_targets(input_ids, labels.to(input_ids.device), attention_mask)
        if self.model.training and self.model.selective.earlier_pass_weight:
            total = self.model.score_passes(passes, targets, "sum")  # of all passes, with their weights
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

    The folder loads wherever `new_llm.models.hf` has been imported. The held memory is not part of it.

    Args:
        directory: where to write; weights already there are replaced.
        tokenizer: saved with the model, with its special tokens; None: none is saved, and token 0 ends a text.

    Raises:
        ValueError: a layer of a class that is not registered.
        UserError: the folder can't be written.
    """
    hf = NewLLMForCausalLM.from_model(model)
    with stage_folder(
        directory, tokenizer, max_length=hf.config.max_position_embeddings, vocab_size=model.vocab_size
    ) as (folder, token_ids):
        hf.config.update(token_ids)
        hf.generation_config = GenerationConfig(**token_ids)
        hf.save_pretrained(str(folder))
