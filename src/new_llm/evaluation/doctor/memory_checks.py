"""Checks of what a model holds between calls: its memory, its streams, its generation and its gates."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from new_llm.data.reversal_pairs import get_reversal_pairs
from new_llm.data.tokenizer import TokenSplit
from new_llm.evaluation.doctor.registry import (
    PROBE_SEED,
    ROUNDING_TOLERANCE,
    Examination,
    Finding,
    fault,
    find_difference,
    ok,
    register_check,
    skip,
    warn,
)
from new_llm.evaluation.memory_usage import find_token_gates, watch_token_gates
from new_llm.evaluation.perplexity import evaluate_sliding_window, evaluate_streaming
from new_llm.evaluation.reversal import evaluate_reversal_curse
from new_llm.models import TransformerLM
from new_llm.models.layers import CompressiveAttention

NUM_PAIRS = 2
NUM_NEW_TOKENS = 12
GATE_MARGIN = 0.16
"""A gate sigmoid(β) has not moved if its β has changed by less than this: 0.46 to 0.54 for one that began at 0.5, 0.86
to 0.90 for one that began at 0.88."""
ALPHA_MARGIN = 1e-3  # an adapter whose α is nearer to 0 than this adds nothing
SEGMENTS_PER_CALL = 8
PATH_FAULTS = ("weights", "modes", "causality", "rows", "memory")
"""With one of these faults the parallel path is no yardstick for streams and generation."""


@register_check("evaluation", after=("weights",))
def check_evaluation(exam: Examination) -> Finding:
    """Evaluation that writes memory or leaves the model in another mode."""
    model, own = exam.model, exam.own_model
    ids = exam.take_segments()
    split = _make_split(ids)
    actions: dict[str, Callable[[], Any]] = {
        "token_losses": lambda: model.token_losses(ids, ids),
        "sliding-window perplexity": lambda: evaluate_sliding_window(
            model, split, context=16, stride=8, batch_size=len(ids)
        ),
        "streaming perplexity": lambda: evaluate_streaming(model, split, batch_size=len(ids)),
        "the reversal curse": lambda: evaluate_reversal_curse(
            model, exam.subject.tokenizer, get_reversal_pairs()[:NUM_PAIRS], num_resamples=1
        ),
    }
    if own:
        actions |= {
            "a call": lambda: own(ids),
            "compute_loss": lambda: own.compute_loss(ids, ids),
            "generate": lambda: own.generate(ids, max_new_tokens=2),
        }
    wrote: dict[str, None] = {}
    left_mode: dict[str, None] = {}
    for training in (False, True):
        with exam.probing(segment_tokens=exam.config.segment_tokens, training=training):
            list(model.modules())[-1].training = not training  # one frozen part, which must stay as it is
            if own and exam.has_memory:
                own.reset_memory(exam.count_rows(ids))
                own(ids, update_memory=True)
            held = copy.deepcopy(own.get_memory_state()) if own else {}
            modes = [module.training for module in model.modules()]
            for name, act in actions.items():
                act()
                if own and not _is_same_state(own.get_memory_state(), held):
                    wrote[name] = None
                    own.set_memory_state(held)
                if [module.training for module in model.modules()] != modes:
                    left_mode[name] = None
                    for module, mode in zip(model.modules(), modes, strict=True):
                        module.training = mode
    if wrote:
        return fault(
            f"the held memory was changed by {', '.join(wrote)}: each reading depends on what was read before it",
            "write memory only where update_memory=True asks for it",
        )
    if left_mode:
        return fault(
            f"the mode was changed by {', '.join(left_mode)}: evaluation during training changes the training",
            "restore each module's mode after evaluation",
        )
    kept = "memory and mode" if exam.has_memory else "the mode"
    return ok(f"{len(actions)} ways of reading left {kept} as they were")


def _make_split(ids: Tensor) -> TokenSplit:
    """Rows of tokens as documents."""
    rows, width = ids.shape
    sizes = np.full(rows, width, np.int64)
    tokens = ids.cpu().numpy().astype(np.uint32).reshape(-1)
    return TokenSplit(tokens, np.arange(rows + 1, dtype=np.int64) * width, num_bytes=sizes, num_words=sizes)


def _is_same_state(a: Any, b: Any) -> bool:
    """Whether two memory states are equal bit for bit."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_is_same_state(a[key], b[key]) for key in a)
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return bool(a == b)


@register_check("memory", after=("weights", "modes"))
def check_memory(exam: Examination) -> Finding:
    """A memory that overflows, miscounts its tokens, or whose M and z have different scales.

    One token repeated n times writes M = n σ(k)ᵀv and z = n σ(k), so that M / z is v whatever n is. With shifted keys
    n is one less, since a segment's first token is not written; the ratio is the same.
    """
    model = exam.own_model
    if model is None or not model.memory_layers:
        return skip("the model has no memory")
    with exam.probing(segment_tokens=exam.config.segment_tokens):
        num_tokens, largest, faults = _fill_memory(exam, model)
        for index, layer in model.memory_layers.items():
            if isinstance(getattr(layer, "attention", None), CompressiveAttention) and _divides(layer):
                error = _compare_scales(layer, model.embed_in(exam.tokens[:1]), model.segment_length)
                if not error <= ROUNDING_TOLERANCE:
                    faults.append(f"layer {index}: M and z have different scales (M / z changes by {error:.2g})")
    found = f"the memory's norm is {largest:.3g} after {num_tokens:,} tokens"
    if not faults:
        return ok(f"{found}; all is finite, counted and in one scale")
    return fault(
        f"{'; '.join(faults)}; {found}: what is read does not have the scale of what was written",
        "scale and decay M and z alike, and keep both in float32",
    )


def _divides(layer: Any) -> bool:
    """Whether z divides what a layer reads, so that it is positive."""
    return getattr(getattr(layer, "attention", None), "use_normalizer", True)


def _fill_memory(exam: Examination, model: TransformerLM) -> tuple[int, float, list[str]]:
    """Read many segments into one memory: tokens read, the largest norm of a layer's tensor, and what is wrong."""
    faults, largest = list[str](), 0.0
    ids = exam.take_rows(1, model.segment_length * exam.config.fill_segments)
    with model.fresh_memory():
        for part in ids.split(model.segment_length * SEGMENTS_PER_CALL, 1):
            model(part, update_memory=True)
        state = model.get_memory_state()
    for index, entry in state.items():
        held = {key: value.double() for key, value in entry.items() if _is_real(value)}
        if not all(bool(torch.isfinite(value).all()) for value in held.values()):
            faults.append(f"layer {index}: the memory is not finite")
        elif _divides(model.memory_layers[index]) and any(
            key.endswith("memory_norms") and bool((value < 0).any()) for key, value in held.items()
        ):
            faults.append(f"layer {index}: z is negative")
        counted = int(entry["token_counts"].sum()) if "token_counts" in entry else ids.numel()
        if counted != ids.numel():
            faults.append(f"layer {index}: counts {counted:,} of {ids.numel():,} tokens")
        largest = max(largest, *(float(value.norm()) for value in held.values()), 0.0)
    return ids.numel(), largest, faults


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 0


def _compare_scales(layer: Any, token: Tensor, length: int) -> float:
    """The relative change of M / z between one token repeated `length` and 2 `length` times in a segment."""
    ratios: list[Tensor] = []
    for count in (length, 2 * length):
        _, memory = layer(token.expand(1, 1, count, -1))  # one segment
        memories, norms = memory.memories[:, 0].double(), memory.norms[:, 0].double()  # written by the first segment
        ratios.append(memories / norms.unsqueeze(-1).clamp_min(1e-30))
    return float((ratios[1] - ratios[0]).norm() / ratios[0].norm().clamp_min(1e-30))


@register_check("calls", after=PATH_FAULTS)
def check_calls(exam: Examination) -> Finding:
    """Results that depend on how a text is cut into calls or fed to a stream."""
    model = exam.own_model
    if model is None:
        return skip("the model has no segments")
    with exam.probing(segment_tokens=exam.config.segment_tokens):
        length = model.segment_length
        ids = exam.take_segments()
        whole = exam.read_fresh(ids, per_row=True)
        with model.fresh_memory(batch_size=len(ids)):
            calls = torch.cat([exam.compute_logits(part, update_memory=True) for part in ids.split(length, 1)], 1)
        with model.fresh_memory(batch_size=len(ids)):
            stream = model.open_stream(len(ids))
            pieces = torch.cat([stream.feed(part) for part in ids.split(max(1, length // 3 + 1), 1)], 1)
    by_call, by_stream = find_difference(calls, whole), find_difference(pieces, whole)
    if max(by_call, by_stream) <= exam.allowed(whole, is_rounded=True):
        return ok(f"calls of one segment differ by {by_call:.2g}, a stream by {by_stream:.2g}")
    return fault(
        f"calls of one segment differ by {by_call:.2g} and a stream by {by_stream:.2g} from one long call: results "
        "depend on how the text is cut",
        "let memory be the only path between segments, and write it only at a segment's end",
    )


@register_check("generation", after=(*PATH_FAULTS, "calls"))
def check_generation(exam: Examination) -> Finding:
    """Generation that drops the prompt, the memory or a pass: its greedy tokens are not the likeliest."""
    model = exam.own_model
    if model is None:
        return skip("transformers generates for this model")
    with exam.probing(segment_tokens=exam.config.segment_tokens):
        length = model.segment_length + max(1, model.segment_length // 2)
        prompt = exam.take_rows(exam.config.num_rows, length)
        torch.manual_seed(PROBE_SEED)
        made, _ = model.generate(prompt, max_new_tokens=NUM_NEW_TOKENS)
        has_prompt = made.shape[1] > length and torch.equal(made[:, :length], prompt)
        new = made[:, length:] if has_prompt else made[:, -NUM_NEW_TOKENS:]
        logits = exam.read_fresh(torch.cat([prompt, new], 1))[:, length - 1 : -1]
        lost = float((logits.amax(-1) - logits.gather(-1, new.unsqueeze(-1)).squeeze(-1)).max())
    if has_prompt and lost <= exam.allowed(logits, is_rounded=True):
        return ok(f"{new.numel()} greedy tokens are the likeliest of the whole text, to {lost:.2g}")
    dropped = "" if has_prompt else "the prompt is not returned; "
    return fault(
        f"{dropped}greedy tokens are up to {lost:.2g} below the likeliest of the whole text: generation is not that of "
        "the trained model",
        "let generation read the whole prompt with the forward pass of training",
    )


@register_check("gates", after=("weights",))
def check_gates(exam: Examination) -> Finding:
    """Gates that training has not moved, or an adapter whose α is still 0.

    A gate sigmoid(β) has moved if its β differs from that of a new layer with the same settings, be it for all tokens
    or, where gates depend on the token, for the text's tokens on average. β is compared, since a gate that begins
    near 1 can hardly move itself.
    """
    model = exam.own_model
    gates = {index: layer.gate_values() for index, layer in model.memory_layers.items()} if model else {}
    gates = {index: values for index, values in gates.items() if values}
    if model is None or not gates:
        return skip("the model has no gates")
    by_token = _measure_token_gates(exam, model)
    stuck, lowest, highest = list[str](), 1.0, 0.0
    for index, values in gates.items():
        layer = model.memory_layers[index]
        shares = by_token.get(index, torch.tensor([values]))  # [tokens, H]
        begun = torch.tensor(type(layer)(**layer.settings).gate_values())
        low, high = shares.quantile(0.01).item(), shares.quantile(0.99).item()
        move = float((shares.logit(eps=1e-6) - begun.logit(eps=1e-6)).abs().mean(0).max())
        lowest, highest = min(lowest, low), max(highest, high)
        if move <= GATE_MARGIN:
            stuck.append(f"layer {index} ({low:.3f} to {high:.3f}, began at {begun[0]:.3f})")
    silent = [index for index, alpha in model.alpha_values().items() if abs(alpha) < ALPHA_MARGIN]
    found = f"gates range from {lowest:.3f} to {highest:.3f}"
    if silent:
        return warn(
            f"{found}; α of layer {', '.join(map(str, silent))} is 0: the adapter adds nothing to the base model",
            "train the adapter, or raise the gates' learning rate, which α shares",
        )
    if stuck:
        return warn(
            f"gates have not moved: {'; '.join(stuck)}: training has not decided how much memory to use",
            "raise train.gate_learning_rate (0.01, without weight decay) or train with more segments per sample",
        )
    return ok(f"{found}, and have moved since training began")


def _measure_token_gates(exam: Examination, model: TransformerLM) -> dict[int, Tensor]:
    """The gates [tokens, H] of layers whose gates depend on the token, on some of the text."""
    if not find_token_gates(model):
        return {}
    with watch_token_gates(model) as found, exam.probing():
        exam.read_fresh(exam.take_rows(1, min(model.segment_length, len(exam.tokens))))
    return found
