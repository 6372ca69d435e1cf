"""Measures of trained models: perplexity, memory on long documents, recall, the reversal curse and others."""

from new_llm.evaluation.caches import Caches, tune_cache
from new_llm.evaluation.language_models import CachedModel, HuggingFaceLM
from new_llm.evaluation.long_documents import LongDocuments
from new_llm.evaluation.measure import (
    MEASURES,
    Baseline,
    Column,
    Measure,
    ModelResult,
    Subject,
    Table,
    TrainingData,
    ask_measure,
    find_measures,
    load_own_measures,
    measure,
    register_measure,
    run_measure,
)
from new_llm.evaluation.memory_usage import MemoryUsage
from new_llm.evaluation.passages import Passages
from new_llm.evaluation.perplexity import (
    PerplexityResult,
    Positions,
    Verdict,
    diagnose_perplexity,
    evaluate_independent,
    evaluate_rolling,
    evaluate_sliding_window,
    evaluate_streaming,
    unigram_perplexity,
)
from new_llm.evaluation.recall import Recall
from new_llm.evaluation.reversal import ReversalResult, ReversalScores, evaluate_reversal_curse
from new_llm.evaluation.scoring import LanguageModel, Reading, Scorer, Scores, join_scores

__all__ = [
    "MEASURES",
    "Baseline",
    "CachedModel",
    "Caches",
    "Column",
    "HuggingFaceLM",
    "LanguageModel",
    "LongDocuments",
    "Measure",
    "MemoryUsage",
    "ModelResult",
    "Passages",
    "PerplexityResult",
    "Positions",
    "Reading",
    "Recall",
    "ReversalResult",
    "ReversalScores",
    "Scorer",
    "Scores",
    "Subject",
    "Table",
    "TrainingData",
    "Verdict",
    "ask_measure",
    "diagnose_perplexity",
    "evaluate_independent",
    "evaluate_reversal_curse",
    "evaluate_rolling",
    "evaluate_sliding_window",
    "evaluate_streaming",
    "find_measures",
    "join_scores",
    "load_own_measures",
    "measure",
    "register_measure",
    "run_measure",
    "tune_cache",
    "unigram_perplexity",
]
