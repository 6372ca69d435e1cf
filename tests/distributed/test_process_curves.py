"""One process, two with all weights (DDP) and two with a share of them (FSDP): the same curve and measurements."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.multiprocessing.spawn import ProcessExitedException

import new_llm.processes
from new_llm import evaluation
from new_llm.config import EvalConfig, TrainConfig, UserError
from new_llm.config.loading import flatten_settings
from new_llm.data.reversal_pairs import get_reversal_pairs
from new_llm.models import create_model, load_model
from new_llm.processes import ALONE, Processes
from new_llm.training import TrainingInterrupted, preparation
from new_llm.training.checkpoint import BEST_FOLDER, list_checkpoints, read_checkpoint
from new_llm.training.preparation import ShardedModel, gather_model, has_unused_parameters, prepare_training
from tiny import make_shape
from training_cases import VOCAB, make_config, make_split, make_trainer, read_curve, run_processes, stop_at

WAYS = ("ddp", "fsdp")
KINDS = ("pythia", "infini", "multi_memory", "hierarchical", "selective", "token_memory")
TOLERANCE = 1e-4
ROWS = {"batch_size": 6, "gradient_accumulation_steps": 2, "learning_rate": 1e-2}
Cases = dict[str, tuple[str, dict[str, Any], dict[str, Any]]]
"""By name the kind of a model, its options, and what its configuration has else."""


def train_all(processes: Processes, root: Path, cases: Cases, ways: tuple[str, ...] = WAYS) -> None:
    for name, (kind, options, changes) in cases.items():
        for way in ways:
            folder = root / (way if processes.count > 1 else "one") / name
            make_trainer(folder, kind, processes=processes, options=options, **ROWS | changes, sharding=way).run()


def compare_all(root: Path, cases: Cases, count: int = 2) -> None:
    train_all(ALONE, root, cases, WAYS[:1])
    run_processes(count, train_all, root, cases)
    for name in cases:
        expected = read_curve(root / "one" / name)
        best = load_model(root / "one" / name / BEST_FOLDER).state_dict()
        assert len(expected) >= 12
        assert max(expected) - min(expected) > 0.1
        for way in WAYS:
            assert read_curve(root / way / name) == pytest.approx(expected, rel=TOLERANCE), (name, way)
            found = load_model(root / way / name / BEST_FOLDER).state_dict()
            torch.testing.assert_close(found, best, atol=1e-3, rtol=1e-5)


def test_two_processes_give_the_curve_of_one(tmp_path):
    """Batches of 6 rows, 2 of them in a step, documents of unequal lengths, rows that run empty at the end."""
    compare_all(
        tmp_path,
        {
            "stream": ("infini", {"num_memory_banks": 2, "segments_per_bank": 1}, {"order": "stream"}),
            # The last batch has fewer rows than a process reads: the other's are all empty.
            "shuffled": ("hierarchical", {}, {"order": "shuffled", "num_samples": 14}),
            # What only writes has no gradient in the first half, and one in the second.
            "one segment": ("token_memory", {}, {"order": "shuffled", "segment_curriculum": (1, 2)}),
        },
    )


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_every_model_and_every_way_to_run_a_step_give_the_curve_of_one_process(tmp_path, count):
    """Also layers run twice, layers called once a pass and segment with memory between, a last batch of few rows."""
    compare_all(
        tmp_path,
        {f"{kind}-{order}": (kind, {}, {"order": order}) for kind in KINDS for order in ("stream", "shuffled")}
        | {
            "checkpointing": ("infini", {}, {"gradient_checkpointing": True}),
            "no accumulation": ("infini", {}, {"gradient_accumulation_steps": 1}),
            "all batches in one step": ("multi_memory", {}, {"gradient_accumulation_steps": 100, "num_epochs": 12}),
            "alibi": ("infini", {"use_alibi": True, "use_delta_rule": False}, {}),
            "long samples": ("infini", {}, {"seq_length": 64, "segments_per_sample": 8, "num_epochs": 6}),
            "shifted keys": ("multi_memory", {"use_key_shift": True}, {}),
        },
        count,
    )


def resume_all(processes: Processes, root: Path, saved_by: str, ways: tuple[str, ...]) -> None:
    """Stop a training after 4 of its steps, or go on with it."""
    for way in ways:
        folder = root / saved_by.format(way=way)
        trainer = make_trainer(folder, processes=processes, sharding=way, **ROWS)
        if not (folder / "checkpoints").exists():
            stop_at(trainer, 4, rank=processes.count - 1)
            with pytest.raises(TrainingInterrupted, match="step 4"):
                trainer.run()
        else:
            trainer.run(resume=True)


def test_a_checkpoint_of_two_processes_goes_on_in_one_and_the_other_way(tmp_path):
    """Each training is stopped by SIGTERM to its last process alone, and goes on with other processes."""
    make_trainer(tmp_path / "whole", **ROWS).run()
    expected = read_curve(tmp_path / "whole")
    run_processes(2, resume_all, tmp_path, "two-{way}", WAYS)
    resume_all(ALONE, tmp_path, "one-{way}", WAYS)
    found = read_checkpoint(list_checkpoints(tmp_path / "two-fsdp")[0])
    alone = read_checkpoint(list_checkpoints(tmp_path / "one-ddp")[0])
    assert found.values["memory_rows"] == alone.values["memory_rows"] == 6
    torch.testing.assert_close(found.weights, alone.weights, atol=1e-3, rtol=1e-5)
    for key, value in alone.values["memory"][0].items():
        if isinstance(value, torch.Tensor):
            assert torch.allclose(value, found.values["memory"][0][key], rtol=1e-2, atol=1e-3), key
    assert found.state.step == 4
    resume_all(ALONE, tmp_path, "two-{way}", WAYS)
    run_processes(2, resume_all, tmp_path, "one-{way}", WAYS)
    for name in ("two-ddp", "two-fsdp", "one-ddp", "one-fsdp"):
        assert read_curve(tmp_path / name) == pytest.approx(expected, rel=TOLERANCE), name


def measure_all(processes: Processes) -> dict[str, Any]:
    torch.manual_seed(0)
    model = create_model("infini", make_config().model.shape(VOCAB), segment_length=8).eval()
    split, shared = make_split(), {"batch_size": 3, "processes": processes}
    pairs = get_reversal_pairs()[:6]
    words = sorted({word for pair in pairs for text in (pair.forward, pair.backward) for word in text.split()})
    tokenizer = Tokenizer(WordLevel({word: index % VOCAB for index, word in enumerate(["?", *words])}, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    settings = EvalConfig(position_edges=(0, 2, 8), batch_size=3)
    subject = evaluation.Subject(model, tokenizer, split, settings, seq_length=16, processes=processes)
    return {
        "sliding": evaluation.evaluate_sliding_window(model, split, context=16, stride=4, **shared).to_dict(),
        "rolling": evaluation.evaluate_rolling(model, split, context=16, prefix_token=0, **shared).to_dict(),
        "independent": evaluation.evaluate_independent(model, split, max_tokens=300, **shared).to_dict(),
        "streaming": evaluation.evaluate_streaming(model, split, **shared).to_dict(),
        # One document: all processes but one have nothing to read.
        "one document": evaluation.evaluate_streaming(model, split, max_tokens=100, **shared).to_dict(),
        "one window": evaluation.evaluate_sliding_window(
            model, split, context=64, stride=64, max_tokens=50, **shared
        ).to_dict(),
        "positions": {str(entry["start"]): entry for entry in evaluation.Positions().run(subject)["ranges"]},
        "reversal": evaluation.evaluate_reversal_curse(model, tokenizer, pairs, num_resamples=20, **shared).to_dict(),
    }


def write_measured(processes: Processes, folder: Path) -> None:
    (folder / f"{processes.rank}.json").write_text(json.dumps(measure_all(processes)))


def test_every_process_has_the_numbers_of_one(tmp_path):
    expected = flatten_settings(json.loads(json.dumps(measure_all(ALONE))))
    run_processes(3, write_measured, tmp_path)
    for rank in range(3):
        found = flatten_settings(json.loads((tmp_path / f"{rank}.json").read_text()))
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            if not name.endswith(("seconds", "tokens_per_second")):
                near = pytest.approx(value, rel=1e-6, abs=1e-9) if isinstance(value, float) else value
                assert found[name] == near, (rank, name)


SHAPE = make_shape()
USES_ALL = {"pythia", "infini", "transformer_xl", "gated_delta", "selective", "token_memory"}


def check_shards(processes: Processes) -> None:
    torch.manual_seed(0)
    whole = create_model("infini", SHAPE, segment_length=8)
    with torch.device("cpu" if processes.is_main else "meta"):
        model = create_model("infini", SHAPE, segment_length=8)
    if processes.is_main:
        model.load_state_dict(whole.state_dict())
    ids = torch.arange(16).view(1, 16)

    def compute_loss(model, batch=None) -> torch.Tensor:
        return model.total_loss(ids, ids) / 15

    # The policy of a GPU, and its autocast's LayerNorm, which computes in float32 whatever the weights' dtype is.
    policy, layer_norm = preparation.choose_policy("bf16", torch.device("cuda")), F.layer_norm
    assert preparation.choose_policy("bf16", torch.device("cpu")).param_dtype is None
    preparation.choose_policy = lambda precision, device: policy
    F.layer_norm = lambda x, shape, *rest: layer_norm(
        x.float(), shape, *(t if isinstance(t, float) else t.float() for t in rest)
    )
    cpu, config = torch.device("cpu"), TrainConfig(sharding="fsdp")
    prepared = prepare_training(model, compute_loss, config, cpu, "bf16", processes)
    assert all(p.device == cpu and 2 * p.to_local().numel() <= p.numel() + 64 for p in model.parameters())
    policies = [part._get_fsdp_state()._fsdp_param_group.mp_policy for part in (*model.layers, prepared.batch_loss)]
    assert [policy.param_dtype for policy in policies] == [torch.bfloat16] * len(model.layers) + [None]
    assert {policy.reduce_dtype for policy in policies} == {torch.float32}
    gathered = gather_model(model, prepared.structure).state_dict()
    torch.testing.assert_close(gathered, whole.state_dict(), rtol=0, atol=0)
    # Documents of unequal lengths, read with the weights divided; then the gradients are as if nothing had been read.
    split = make_split((40, 9, 9))
    reading = {"batch_size": 1, "autocast": lambda: torch.autocast("cpu", torch.bfloat16)}
    found = evaluation.evaluate_streaming(
        ShardedModel(prepared, model, processes), split, processes=processes, **reading
    )
    assert found.loss == pytest.approx(evaluation.evaluate_streaming(whole, split, **reading).loss, rel=1e-3)
    assert all(2 * p.to_local().numel() <= p.numel() + 64 for p in model.parameters())
    loss = prepared.batch_loss(None)
    loss.backward()
    with torch.autocast("cpu", torch.bfloat16):
        expected = compute_loss(whole)
    expected.backward()
    assert float(loss) == pytest.approx(float(expected), rel=1e-3)
    for mine, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.allclose(mine.grad.full_tensor(), theirs.grad, atol=0.03 * float(theirs.grad.abs().max()) + 1e-6)


def test_sharded_weights_are_never_whole_on_a_device_and_are_gathered_in_bf16():
    run_processes(2, check_shards)


@pytest.mark.parametrize("kind", [*sorted(USES_ALL), "hierarchical", "rmt"])
def test_ddp_looks_for_unused_parameters_only_where_there_are_some(kind):
    model = create_model(kind, SHAPE, segment_length=8)
    has_some = has_unused_parameters(model, lambda model, batch: model.total_loss(batch.input_ids, batch.labels))
    assert has_some == (kind not in USES_ALL)
    assert all(parameter.grad is None for parameter in model.parameters())


def wait_for_ever(processes: Processes) -> None:
    new_llm.processes.WATCH_SECONDS = new_llm.processes.GRACE_SECONDS = 0.1
    try:
        with processes.guard():
            if processes.rank == 1:
                raise UserError("process 1 can't go on")
            processes.sum_on_device(torch.ones(1))
    except UserError:
        time.sleep(600)


def test_a_process_that_waits_for_one_that_failed_ends():
    with pytest.raises(ProcessExitedException) as caught:
        run_processes(2, wait_for_ever)
    assert (caught.value.error_index, caught.value.exit_code) == (0, 2)


@pytest.mark.parametrize(
    ("visible", "uuids", "index"), [(2, "ab", 1), (1, "ab", 0), (1, "aa", None)], ids=["all", "its own", "shared"]
)
def test_each_process_takes_a_gpu_of_its_own(monkeypatch, visible, uuids, index):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    properties = type("Properties", (), {"uuid": uuids[1]})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(Processes, "gather", lambda self, value: [(value[0], uuids[0]), value])
    processes = Processes(rank=1, count=2, local_rank=1)
    if index is None:
        with pytest.raises(UserError, match="number 2 on its machine, where it sees 1 GPUs, and would share one"):
            processes.place(torch.device("cuda"))
    else:
        assert processes.place(torch.device("cuda")) == torch.device("cuda", index)
        assert os.environ["LOCAL_RANK"] == str(index)
