"""Train a study's models together with a cache of the text, so that they learn what the cache can't know.

The loss of a token is that of the mixture of the model and untrained caches of the document so far (n-grams and the
longest match): −log(p + ρ), where p is the model's probability, and ρ = Σ_k λ_k p_k / λ_model is the caches' share,
known before training. A token that the caches predict well hardly counts. The weights λ are tuned on the first training
documents by a trained model. Everything else, the measurements included, is the study's; the figures are in trial 14 of
docs/experiments/log.md. Train a model first, and then, in its terms:

    new-llm study studies/addresses.yaml --only pythia_single-4e-3 --seeds 1
    python studies/cached_training.py studies/addresses.yaml --only pythia_single-4e-3 --seeds 1 --tuned-by RUN

RUN is runs/addresses/pythia_single-4e-3-s1.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from new_llm.config.evaluation import SubjectConfig
from new_llm.config.loading import read_settings
from new_llm.config.model import CacheConfig
from new_llm.data.batches import IGNORED_LABEL, Batch, BatchPlan
from new_llm.data.dataset import prepare_data
from new_llm.data.tokenizer import TokenSplit
from new_llm.evaluation.caches import Parts, tune_cache
from new_llm.experiments import runner, study
from new_llm.experiments.config import StudyConfig
from new_llm.experiments.subject import load_any_model
from new_llm.models import TransformerLM
from new_llm.models.cache import score_match, score_ngrams
from new_llm.training import Trainer

NGRAM_ORDER = 3
TUNING_DOCUMENTS = 8


def tune_by(run: str) -> CacheConfig:
    """The cache, with weights tuned by a run's model on its first training documents."""
    loaded = load_any_model(SubjectConfig(run=run, device="cpu", precision="fp32"))
    assert loaded.config is not None
    split = prepare_data(loaded.config.data).train
    documents = [split.document(index) for index in range(TUNING_DOCUMENTS)]
    return tune_cache(loaded.model, documents, CacheConfig(ngram_order=NGRAM_ORDER, longest_match=True))


def compute_shares(split: TokenSplit, cache: CacheConfig) -> NDArray[np.float32]:
    """ρ of each token of a split; 0 for the first of a document."""
    weights = np.array(cache.weights)
    shares = np.zeros(len(split.tokens), np.float32)
    for begin, end in zip(split.offsets[:-1].tolist(), split.offsets[1:].tolist(), strict=True):
        if end - begin < 2:
            continue
        tokens = np.asarray(split.tokens[begin:end]).astype(np.int64)
        nothing = np.zeros(len(tokens) - 1)
        parts = Parts(nothing, nothing, score_ngrams(tokens, cache.ngram_order), *score_match(tokens))
        found, contexts = parts.select(cache, (), 0)
        chosen = weights[contexts]
        shares[begin + 1 : end] = np.nansum((found * chosen)[:, 1:], axis=1) / chosen[:, 0]
    return shares


class CachedPlan(BatchPlan):
    """A plan whose label weights are ρ, which stands in the planter's place."""

    def _plant(self, planter: Any, tokens: NDArray[Any], starts: NDArray[Any], counts: NDArray[Any]) -> NDArray[Any]:
        columns = np.arange(tokens.shape[1])
        places = np.minimum(starts[:, None] + columns, len(planter) - 1)
        return np.where(columns < counts[:, None], planter[places], 0)


class CachedTrainer(Trainer):
    """A trainer whose loss is that of the mixture, after the share `begin` of its steps."""

    cache: CacheConfig
    begin: float

    def __post_init__(self) -> None:
        self.planter = cast(Any, compute_shares(self.split, self.cache))
        super().__post_init__()

    def _plan_samples(self, epoch: int, segments: int, batch_size: int | None = None) -> BatchPlan:
        plan = super()._plan_samples(epoch, segments, batch_size)
        return CachedPlan(**{field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)})

    def _compute_loss(self, model: TransformerLM, batch: Batch) -> Tensor:
        assert batch.label_weights is not None
        targets = model.find_targets(batch.input_ids, batch.labels, batch.attention_mask)
        losses = model.score_passes(model.compute_passes(batch.input_ids, batch.attention_mask), targets)
        if self.state.step >= self.begin * self.steps_per_epoch * self.config.num_epochs:
            losses = -torch.logaddexp(-losses, batch.label_weights[:, 1:].log())
        total = losses.masked_fill(targets == IGNORED_LABEL, 0).sum()
        return model.add_auxiliary_loss(total, targets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--only", nargs="+", required=True, metavar="VARIANT")
    parser.add_argument("--seeds", nargs="+", type=int, required=True)
    parser.add_argument("--tuned-by", required=True, metavar="RUN", help="a run of the same text")
    parser.add_argument("--begin", type=float, default=0.0, help="share of the training before the mixture")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/cached"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    config = read_settings(given.study, StudyConfig)
    chosen = dataclasses.replace(
        config,
        variants={name: config.variants[name] for name in given.only},
        seeds=tuple(given.seeds),
        reference=given.only[0],
        baselines=(),
        runs_dir=given.runs_dir,
    )
    CachedTrainer.cache, CachedTrainer.begin = tune_by(given.tuned_by), given.begin
    runner.Trainer = CachedTrainer
    study.run_study(chosen, jobs=None)


if __name__ == "__main__":
    main()
