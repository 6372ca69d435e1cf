"""Whether a model computes the same each time, in training as in evaluation, in training's precision as without."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from new_llm.evaluation.doctor_probe import Measured, Patient, find_difference
from new_llm.models import SelectiveOutputLM

LOSS_MARGIN = 0.02
"""Nats by which autocast may change the mean loss."""


def check_modes(patient: Patient) -> Measured:
    """Logits twice in evaluation and twice in training, and the training loss; then the autocast's loss."""
    ids = patient.take_rows(patient.config.num_rows, patient.config.segment_tokens * patient.config.num_segments)
    ids = ids if patient.own_model is not None else ids[:, : patient.model.segment_length]
    compute = _make_reader(patient, ids)
    first = compute(training=False, seed=0)
    allowed = patient.allowed(first)
    figures: dict[str, Any] = {
        "repeated": find_difference(compute(training=False, seed=1), first),
        "training": max(find_difference(compute(training=True, seed=seed), first) for seed in (0, 1)),
        "training_loss": _compare_losses(patient, ids),
        "allowed": allowed,
    }
    measured = f"logits differ by {figures['repeated']:.2g} when read again, by {figures['training']:.2g} in training"
    if figures["repeated"] > allowed:
        return Measured(
            "fault",
            measured,
            "evaluation is not deterministic: something in the model is random in evaluation mode",
            "look for dropout that does not ask self.training",
            figures,
        )
    is_own = patient.own_model is not None
    if figures["training"] > allowed or figures["training_loss"] > patient.allowed(first, is_rounded=True):
        has_dropout = any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in patient.model.modules())
        return Measured(
            "fault" if is_own or not has_dropout else "warning",
            f"{measured}; the training loss by {figures['training_loss']:.2g} nats",
            "the model in training is another one than in evaluation"
            + (": it has dropout" if has_dropout else ", though it has no dropout"),
            "compare training and validation losses with care" if has_dropout else "use one forward pass for both",
            figures,
        )
    with patient.autocast():
        cast = compute(training=False, seed=0)
    figures["autocast_loss"] = abs(_mean_loss(cast, ids) - _mean_loss(first, ids))
    if figures["autocast_loss"] > LOSS_MARGIN:
        return Measured(
            "warning",
            f"{measured}; autocast changes the mean loss by {figures['autocast_loss']:.2g} nats",
            "readings with and without autocast can't be compared",
            "measure in the precision that the model was trained in",
            figures,
        )
    return Measured.ok(measured, **figures)


def _make_reader(patient: Patient, ids: Tensor) -> Callable[..., Tensor]:
    def compute(*, training: bool, seed: int) -> Tensor:
        with patient.probing(segment_tokens=patient.config.segment_tokens, training=training):
            torch.manual_seed(seed)
            if patient.own_model is not None:
                return patient.model(ids).float()
            return patient.model.model(input_ids=ids, use_cache=False).logits.float()

    return compute


def _compare_losses(patient: Patient, ids: Tensor) -> float:
    """The mean loss in training, gradients on, against the one in evaluation."""
    model = patient.own_model
    if model is None:
        return 0.0
    if isinstance(model, SelectiveOutputLM) and model.earlier_pass_weight and model.num_passes > 1:
        return 0.0  # its training loss also counts the earlier passes, as it says
    found: list[float] = []
    for training in (False, True):
        gradients = torch.enable_grad() if training else contextlib.nullcontext()
        with patient.probing(segment_tokens=patient.config.segment_tokens, training=training), gradients:
            loss, _ = model.compute_loss(ids, ids)
            found.append(float(loss.detach()))
    return abs(found[0] - found[1])


def _mean_loss(logits: Tensor, ids: Tensor) -> float:
    return float(-logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).mean())
