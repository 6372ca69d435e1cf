"""Long documents and recall, measured as their settings say: what `new-llm eval` and studies share."""

from collections.abc import Callable, Sequence

from new_llm.config import UserError
from new_llm.config.evaluation import LongDocumentsConfig, RecallConfig
from new_llm.data.tokens import TokenSplit
from new_llm.evaluation import (
    Baseline,
    LongDocumentsResult,
    RecallResult,
    evaluate_long_documents,
    evaluate_recall,
)
from new_llm.evaluation.scoring import Progress, never
from new_llm.experiments.subject import Subject


def measure_long_documents(
    subject: Subject,
    split: TokenSplit,
    settings: LongDocumentsConfig,
    baselines: Sequence[Baseline],
    *,
    on_progress: Progress | None = None,
    should_stop: Callable[[], bool] = never,
) -> LongDocumentsResult:
    """Perplexity of long documents by distance from their start; see `evaluate_long_documents`.

    Args:
        subject: the model.
        split: the documents.
        settings: how; the baselines that it names are the caller's to load.
        baselines: other models.
        on_progress: called with the tokens scored so far and in all.
        should_stop: asked after each batch; once it says True, the result is of what has been scored by then.

    Raises:
        UserError: no document is long enough.
    """
    return evaluate_long_documents(
        subject.model,
        split,
        settings,
        baselines=baselines,
        device=subject.device,
        autocast=subject.autocast,
        on_progress=on_progress,
        should_stop=should_stop,
    )


def measure_recall(
    subject: Subject,
    split: TokenSplit,
    settings: RecallConfig,
    *,
    on_progress: Progress | None = None,
    should_stop: Callable[[], bool] = never,
) -> RecallResult:
    """Recall of hidden sentences by the text's length and their depth; see `evaluate_recall`.

    Args:
        subject: the model.
        split: documents of real text.
        settings: how.
        on_progress: called with the tokens of the texts read so far and in all.
        should_stop: asked after each call; once it says True, the result is of the texts asked by then.

    Raises:
        UserError: there is no text, or the segments are too short for any sentence and question asked for.
    """
    return evaluate_recall(
        subject.model,
        subject.tokenizer,
        split,
        settings,
        device=subject.device,
        autocast=subject.autocast,
        on_progress=on_progress,
        should_stop=should_stop,
    )


def check_tokenizer(other: Subject, subject: Subject, where: str, name: str) -> None:
    """Refuse a baseline whose tokens are not the subject's.

    Args:
        other: the baseline.
        subject: the model that is measured.
        where: what names the baseline, for the message.
        name: what the subject is called.

    Raises:
        UserError: their tokenizers differ.
    """
    if other.facts["tokenizer_fingerprint"] != subject.facts["tokenizer_fingerprint"]:
        raise UserError(f"{where}: its tokenizer is not that of {name}: tokens can't be compared")
