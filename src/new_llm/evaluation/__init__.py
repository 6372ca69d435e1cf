"""Measurements of a trained model: perplexity, the reversal curse, and what a reading most likely means."""

from new_llm.evaluation.diagnosis import Verdict, diagnose_perplexity
from new_llm.evaluation.perplexity import (
    evaluate_independent,
    evaluate_rolling,
    evaluate_sliding_window,
    evaluate_streaming,
    unigram_perplexity,
)
from new_llm.evaluation.positions import evaluate_positions
from new_llm.evaluation.reversal import ReversalResult, ReversalScores, evaluate_reversal_curse
from new_llm.evaluation.scoring import LanguageModel
from new_llm.evaluation.tally import PerplexityResult
from new_llm.evaluation.windows import Window, plan_rolling_windows, plan_segments, plan_windows

__all__ = [
    "LanguageModel",
    "PerplexityResult",
    "ReversalResult",
    "ReversalScores",
    "Verdict",
    "Window",
    "diagnose_perplexity",
    "evaluate_independent",
    "evaluate_positions",
    "evaluate_reversal_curse",
    "evaluate_rolling",
    "evaluate_sliding_window",
    "evaluate_streaming",
    "plan_rolling_windows",
    "plan_segments",
    "plan_windows",
    "unigram_perplexity",
]
