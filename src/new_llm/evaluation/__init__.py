"""Measurements of a trained model: perplexity, the reversal curse, and what a reading most likely means."""

from new_llm.evaluation.cached_model import CachedModel
from new_llm.evaluation.caches import CachesResult, evaluate_caches, tune_cache
from new_llm.evaluation.diagnosis import Verdict, diagnose_perplexity
from new_llm.evaluation.long_documents import LongDocumentsResult, evaluate_long_documents
from new_llm.evaluation.measure import (
    MEASURES,
    Baseline,
    Column,
    Measure,
    ModelResult,
    Subject,
    Table,
    TrainingData,
    find_measures,
    load_own_measures,
    measure,
    register_measure,
)
from new_llm.evaluation.memory_usage import measure_memory_usage
from new_llm.evaluation.passages import Passages
from new_llm.evaluation.perplexity import (
    PerplexityResult,
    evaluate_independent,
    evaluate_rolling,
    evaluate_sliding_window,
    evaluate_streaming,
    unigram_perplexity,
)
from new_llm.evaluation.positions import evaluate_positions
from new_llm.evaluation.recall import RecallResult, evaluate_recall
from new_llm.evaluation.reversal import evaluate_reversal_curse
from new_llm.evaluation.reversal_scores import ReversalResult, ReversalScores
from new_llm.evaluation.scoring import LanguageModel, Reading, Scorer, Scores, join_scores
from new_llm.evaluation.windows import Window, plan_rolling_windows, plan_segments, plan_windows

__all__ = [
    "MEASURES",
    "Baseline",
    "CachedModel",
    "CachesResult",
    "Column",
    "LanguageModel",
    "LongDocumentsResult",
    "Measure",
    "ModelResult",
    "Passages",
    "PerplexityResult",
    "Reading",
    "RecallResult",
    "ReversalResult",
    "ReversalScores",
    "Scorer",
    "Scores",
    "Subject",
    "Table",
    "TrainingData",
    "Verdict",
    "Window",
    "diagnose_perplexity",
    "evaluate_caches",
    "evaluate_independent",
    "evaluate_long_documents",
    "evaluate_positions",
    "evaluate_recall",
    "evaluate_reversal_curse",
    "evaluate_rolling",
    "evaluate_sliding_window",
    "evaluate_streaming",
    "find_measures",
    "join_scores",
    "load_own_measures",
    "measure",
    "measure_memory_usage",
    "plan_rolling_windows",
    "plan_segments",
    "plan_windows",
    "register_measure",
    "tune_cache",
    "unigram_perplexity",
]
