"""The values of the lines of `metrics.jsonl`."""

from typing import Any

import torch

from new_llm.models import TransformerLM
from new_llm.training.checkpoint import TrainerState


def describe_steps(state: TrainerState, model: TransformerLM, learning_rate: float, grad_norm: float) -> dict[str, Any]:
    """The steps since the last such line.

    Args:
        state: the counters.
        model: whose gates and α are shown.
        learning_rate: of the next step.
        grad_norm: of the last step.
    """
    values: dict[str, Any] = {
        "epoch": state.epoch + 1,
        "batch": state.batch,
        "tokens": state.num_tokens,
        "loss": state.window_loss / max(state.window_tokens, 1),
        "learning_rate": learning_rate,
        "grad_norm": grad_norm,
        "seconds": state.seconds,
        "tokens_per_second": state.window_tokens / max(state.window_seconds, 1e-9),
        "gates": model.gate_values(),
    }
    if alphas := model.alpha_values():
        values["alpha"] = alphas
    return values


def describe_epoch(state: TrainerState, loss: float, *, is_best: bool) -> dict[str, Any]:
    """An epoch that has ended.

    Args:
        state: the counters.
        loss: of validation, nats a token.
        is_best: whether it is the best so far.
    """
    return {
        "epoch": state.epoch,
        "tokens": state.num_tokens,
        "train_loss": state.epoch_loss / max(state.epoch_tokens, 1),
        "validation_loss": loss,
        "validation_perplexity": float(torch.tensor(loss, dtype=torch.float64).exp()),
        "seconds": state.seconds,
        "is_best": is_best,
    }
