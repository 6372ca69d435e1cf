"""What a model holds: that evaluation leaves it alone, and that it stays in scale however much is read."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from new_llm.data.reversal_pairs import get_reversal_pairs
from new_llm.data.tokens import TokenSplit
from new_llm.evaluation.doctor_probe import Measured, Patient
from new_llm.evaluation.perplexity import evaluate_sliding_window, evaluate_streaming
from new_llm.evaluation.reversal import evaluate_reversal_curse
from new_llm.models import TransformerLM
from new_llm.models.layers import CompressiveAttention

NUM_PAIRS = 2
GROWTH_ERROR = 1e-3
"""Relative error allowed where M and z must grow alike."""


def check_evaluation(patient: Patient) -> Measured:
    """Bit for bit the same memory, and the same mode of every module, after everything that only reads."""
    model = patient.model
    rows, width = patient.config.num_rows, patient.config.segment_tokens * 2
    ids = patient.take_rows(rows, min(width, model.segment_length) if patient.own_model is None else width)
    split = split_rows(ids)
    actions: dict[str, Callable[[], Any]] = {
        "token_losses": lambda: model.token_losses(ids, ids),
        "sliding-window perplexity": lambda: evaluate_sliding_window(
            model, split, context=16, stride=8, batch_size=rows
        ),
        "streaming perplexity": lambda: evaluate_streaming(model, split, batch_size=rows),
        "the reversal curse": lambda: evaluate_reversal_curse(
            model, patient.tokenizer, get_reversal_pairs()[:NUM_PAIRS], num_resamples=1
        ),
    }
    own = patient.own_model
    if own is not None:
        actions |= {
            "a call": lambda: own(ids),
            "compute_loss": lambda: own.compute_loss(ids, ids),
            "generation": lambda: own.generate(ids, max_new_tokens=2),
        }
    changed: list[str] = []
    left_mode: list[str] = []
    for training in (False, True):
        with patient.probing(segment_tokens=patient.config.segment_tokens, training=training):
            next(reversed(list(model.modules()))).training = not training  # a part may be frozen: it stays so
            held = None
            if own is not None and own.memory_layers:
                own(ids, update_memory=True)
                held = copy.deepcopy(own.get_memory_state())
            modes = [module.training for module in model.modules()]
            for name, act in actions.items():
                act()
                if own is not None and held is not None and not is_same_state(own.get_memory_state(), held):
                    changed.append(name)
                    own.set_memory_state(held)
                if [module.training for module in model.modules()] != modes:
                    left_mode.append(name)
                    for module, mode in zip(model.modules(), modes, strict=True):
                        module.training = mode
    changed, left_mode = list(dict.fromkeys(changed)), list(dict.fromkeys(left_mode))
    figures = {"num_actions": 2 * len(actions), "memory_changed_by": changed, "mode_changed_by": left_mode}
    if changed:
        return Measured(
            "fault",
            f"the held memory was changed by {', '.join(changed)}",
            "evaluation writes memory: each reading depends on what was read before, and on the batch",
            "write memory where update_memory=True is asked for, and nowhere else",
            figures,
        )
    if left_mode:
        return Measured(
            "fault",
            f"modules were left in another mode by {', '.join(left_mode)}",
            "evaluation in the middle of training changes how training goes on",
            "put each module's mode back after evaluation",
            figures,
        )
    what = "memory and mode" if patient.has_memory else "the mode (there is no memory)"
    return Measured.ok(f"{len(actions)} ways to read left {what} as before", **figures)


def split_rows(ids: Tensor) -> TokenSplit:
    """Rows of tokens as documents."""
    rows, width = ids.shape
    return TokenSplit(
        tokens=ids.cpu().numpy().astype(np.uint32).reshape(-1),
        offsets=np.arange(rows + 1, dtype=np.int64) * width,
        num_bytes=np.full(rows, width, np.int64),
        num_words=np.full(rows, width, np.int64),
    )


def is_same_state(a: Any, b: Any) -> bool:
    """Whether two memory states are equal bit for bit."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(is_same_state(a[key], b[key]) for key in a)
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return bool(a == b)


def check_growth(patient: Patient) -> Measured:
    """Read a long text into a memory, and the same hidden states once and twice: M and z must grow alike.

    Of a memory whose writes are not sums of outer products over a segment only the first is asked.
    """
    model = patient.own_model
    if model is None or not model.memory_layers:
        return Measured.skip("the model has no memory")
    figures: dict[str, Any] = {"layers": {}}
    faults: list[str] = []
    with patient.probing(segment_tokens=patient.config.segment_tokens):
        faults += _read_long(patient, model, figures)
        hidden = model.embed_in(patient.take_rows(1, model.segment_length)).unsqueeze(1)  # [1, 1, S, D]
        summing = {i: one for i, one in model.memory_layers.items() if isinstance(one.attention, CompressiveAttention)}
        for index, layer in summing.items():
            error = _compare_growth(layer, hidden)
            figures["layers"][str(index)]["growth_error"] = error
            if error > GROWTH_ERROR:
                faults.append(f"layer {index}: M and z of a text read twice grow unlike, by {error:.2g}")
    largest = max(layer["largest_memory"] for layer in figures["layers"].values())
    measured = f"{figures['num_tokens']:,} tokens read: ‖M‖ up to {largest:.3g}"
    if not faults:
        return Measured.ok(f"{measured}, finite{'; M and z grow alike' if summing else ''}", **figures)
    return Measured(
        "fault",
        f"{measured}; {'; '.join(faults)}",
        "what is read from memory does not have the scale of what was written",
        "scale M and z alike, or neither; keep both in float32",
        figures,
    )


def _read_long(patient: Patient, model: TransformerLM, figures: dict[str, Any]) -> list[str]:
    faults: list[str] = []
    ids = patient.take_rows(1, model.segment_length * patient.config.fill_segments)
    with model.fresh_memory():
        for part in ids.split(model.segment_length * 8, 1):
            model(part, update_memory=True)
        for index, layer in model.memory_layers.items():
            state = model.get_memory_state()[index]
            memories, norms = (state[key].double() for key in layer.memory_facts.memory_keys)
            counted = int(state["token_counts"].sum())
            if not bool(torch.isfinite(memories).all() and torch.isfinite(norms).all()):
                faults.append(f"layer {index}: not finite")
            elif bool((norms < 0).any()):
                faults.append(f"layer {index}: z is negative")
            if counted != ids.numel():
                faults.append(f"layer {index}: counts {counted:,} of {ids.numel():,} tokens")
            sizes = memories.flatten(-2).norm(dim=-1)
            figures["layers"][str(index)] = {
                "largest_memory": float(sizes.max()),
                "largest_norm": float(norms.norm(dim=-1).max()),
            }
    figures["num_tokens"] = ids.numel()
    return faults


def _compare_growth(layer: Any, hidden: Tensor) -> float:
    """How far M and z are from growing alike: inside one write, and (without the delta rule) over two."""

    def write(states: Tensor) -> tuple[Tensor, Tensor]:
        _, memory = layer(states)
        return memory.memories.double().sum(1), memory.norms.double().sum(1)  # over the memories, written in turn

    once_m, once_z = write(hidden)
    error = 0.0
    for states, is_delta in (
        (torch.cat([hidden, hidden], 2), False),
        (torch.cat([hidden, hidden], 1), layer.attention.use_delta_rule),
    ):
        twice_m, twice_z = write(states)
        growth = twice_z.sum(-1) / once_z.sum(-1)  # [1, H]; 2, or 1 + w where the first write decays
        error = max(error, _relative(twice_z, growth[..., None] * once_z))
        if not is_delta:  # the delta rule leaves out of M what it already holds
            error = max(error, _relative(twice_m, growth[..., None, None] * once_m))
    return error


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / a.norm().clamp_min(1e-30))
