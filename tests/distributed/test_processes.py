"""Several processes: what they say to one another, what is left when they end, and the curve of one."""

import atexit
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.multiprocessing.spawn import ProcessExitedException

import new_llm.processes
from new_llm import evaluation
from new_llm.cli.main import check_command, main
from new_llm.config import EvalConfig, TrainConfig, UserError
from new_llm.config.errors import OtherProcessError
from new_llm.config.loading import flatten_settings
from new_llm.data.reversal_pairs import get_reversal_pairs
from new_llm.experiments.run_folder import read_json
from new_llm.models import create_model, load_model
from new_llm.processes import ALONE, Processes, _end_processes, start_processes
from new_llm.training import TrainingInterrupted, preparation
from new_llm.training.checkpoint import BEST_FOLDER, list_checkpoints, read_checkpoint, share_weights
from new_llm.training.preparation import ShardedModel, gather_model, has_unused_parameters, prepare_training
from tiny import ENVIRONMENT, make_settings, make_shape, wait_until
from training_cases import VOCAB, make_config, make_split, make_trainer, read_curve, run_processes, spoil, stop_at


def talk(processes: Processes) -> None:
    rank, count = processes.rank, processes.count
    assert start_processes() is processes
    assert processes.gather(rank * 10) == [0, 10, 20]
    assert processes.share(f"from {rank}") == "from 0"
    assert processes.run_on_main(lambda: os.environ["RANK"]) == "0"
    assert processes.sum(np.array([rank, 0.25])).tolist() == [3, 0.75]
    assert processes.slice_rows(6) == slice(2 * rank, 2 * rank + 2)
    with pytest.raises(UserError, match=r"train\.batch_size: 7 can't be divided among 3 processes"):
        processes.slice_rows(7)
    model = torch.nn.Linear(2, 3)
    torch.nn.init.constant_(model.weight, rank)
    share_weights(model.state_dict() if rank == 0 else {}, model, processes)
    assert model.weight.tolist() == [[0.0] * 2] * 3

    order: list[float] = []
    began = processes.run_main_first(lambda: order.append(time.monotonic()) or time.sleep(0.1) or order[0])
    assert min(processes.gather(began)[1:]) >= processes.gather(began)[0] + 0.1

    # An error of one is an error of all, and one of them has the words.
    for error, is_user_error in ((UserError("bad input"), True), (OSError("no disk"), True), (KeyError("bug"), False)):
        work = Mock(side_effect=error if rank == 1 else None)
        with pytest.raises((type(error), OtherProcessError)) as caught, processes.agree():
            work()
        assert (type(caught.value) is type(error)) == (rank == 1)
        assert str(caught.value).endswith(str(error))
        assert rank == 1 or caught.value.is_user_error == is_user_error
    with pytest.raises((UserError, OtherProcessError)) as caught, processes.agree():
        raise UserError(f"process {rank} too")
    assert isinstance(caught.value, UserError) == (rank == 0)

    assert [processes.any(rank == wished) for wished in (0, count - 1, count)] == [True, True, False]


def test_processes_agree():
    run_processes(3, talk)


def count_gloo_threads() -> int:
    return sum(name.read_text() == "pt_gloo_runloop\n" for name in Path("/proc/self/task").glob("*/comm"))


def train_and_count(processes: Processes, folder: Path) -> None:
    make_trainer(folder, processes=processes, num_epochs=1, batch_size=6).run()
    rank = processes.rank  # the handler must not hold the processes themselves

    def end() -> None:
        before = count_gloo_threads()
        _end_processes()
        (folder / f"threads-{rank}").write_text(f"{before > 0} {count_gloo_threads()}")

    atexit.unregister(_end_processes)
    atexit.register(end)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the names of threads in /proc")
def test_no_thread_of_a_group_outlives_the_leave(tmp_path):
    """A thread that drops its last tensor while Python ends aborts the process after a finished training."""
    run_processes(2, train_and_count, tmp_path, start_method="spawn")
    for rank in range(2):
        assert (tmp_path / f"threads-{rank}").read_text() == "True 0"


SEVERAL = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def start(folder: Path, *flags: str, launcher=(), **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, *launcher, "-m", "new_llm.cli.main", "experiment", "--runs-dir", str(folder), *flags]
    return subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=ENVIRONMENT | environment)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, list[str]]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, [line for line in err.splitlines() if line.startswith("new-llm: ")]


@pytest.fixture(scope="module")
def flags(addresses: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    settings = make_settings(addresses, Path("runs")) | {"models": ["infini"]}
    settings["data"] |= {"num_samples": 60}
    settings["train"] |= {"num_epochs": 40, "patience": 0, "log_every_steps": 1}
    path = tmp_path_factory.mktemp("settings") / "settings.yaml"
    path.write_text(yaml.safe_dump(settings))
    return ["--config", str(path)]


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_sigterm_to_the_launcher_saves_and_one_process_goes_on(tmp_path, flags, sharding):
    assert finish(start(tmp_path, "--name", "whole", *flags))[0] == 0
    process = start(tmp_path, "--name", "both", *flags, "--train.sharding", sharding, launcher=SEVERAL)
    metrics = tmp_path / "both" / "infini" / "metrics.jsonl"
    assert wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 5, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert out == ""
    assert err.count("interrupted at step") == 1
    assert err.count("continue with: new-llm experiment") == 1
    assert read_json(tmp_path / "both" / "results.json") is None
    assert finish(start(tmp_path, "--name", "both", "--resume", "--train.sharding", "ddp"))[0] == 0
    expected = read_curve(tmp_path / "whole" / "infini")
    assert read_curve(tmp_path / "both" / "infini") == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (("--batch-size", "5"), "5 can't be divided among 2 processes"),
        (("--data.source", "nowhere"), "nowhere: no such file or folder"),
    ],
)
def test_bad_input_is_one_line_of_one_process(tmp_path, flags, bad, message):
    # Without torchrun's own words: each process as `srun` would start it.
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000)}
    given = ["--name", "bad", *flags, *bad]
    processes = [start(tmp_path / "runs", *given, **environment, RANK=str(rank)) for rank in range(2)]
    ended = [finish(process) for process in processes]
    assert [(code, out) for code, out, _ in ended] == [(2, "")] * 2
    (line,) = [line for _, _, said in ended for line in said]
    assert message in line
    assert not (tmp_path / "runs").exists()


def test_a_launcher_that_is_not_understood_and_several_processes_of_a_command_of_one_are_refused(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="RANK, MASTER_ADDR, MASTER_PORT is not set"):
        start_processes()
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match=r"train\.sharding"):
        start_processes()
    monkeypatch.setenv("RANK", "0")
    assert main(["runs"]) == 2
    assert "runs runs in one process, not in 4; only experiment, " in capsys.readouterr().err
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr("new_llm.cli.main.QUIET_SECONDS", 0.0)
    assert main(["runs"]) == 2
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match="not a number of processes"):
        check_command("experiment")


# One process, two with all weights (DDP) and two with a share of them (FSDP): the same curve and measurements


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
            trainer = make_trainer(folder, kind, processes=processes, options=options, **ROWS | changes, sharding=way)
            if "NaN" in name and processes.rank + 1 == processes.count:
                spoil(trainer, {3})
            trainer.run()


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
            "a skipped NaN of one process": ("infini", {}, {"on_nonfinite": "skip"}),
        },
        count,
    )


def resume_all(processes: Processes, root: Path, saved_by: str, ways: tuple[str, ...]) -> None:
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
        with pytest.raises(UserError, match="number 2 on its machine, sees 1 GPUs and would share one"):
            processes.place(torch.device("cuda"))
    else:
        assert processes.place(torch.device("cuda")) == torch.device("cuda", index)
        assert os.environ["LOCAL_RANK"] == str(index)
