"""Sharded weights: laid out on meta, gathered in bf16. And what DDP, the devices and a failing process need."""

import os
import time

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.spawn import ProcessExitedException

import new_llm.processes
from new_llm.config import TrainConfig, UserError
from new_llm.models import create_model
from new_llm.processes import Processes
from new_llm.training import preparation
from new_llm.training.preparation import gather_model, has_unused_parameters, prepare_training
from tiny import make_shape
from training_cases import run_processes

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
    assert all(torch.equal(gathered[name], weight) for name, weight in whole.state_dict().items())
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
    assert has_unused_parameters(model, lambda model, batch: model.total_loss(batch.input_ids, batch.labels)) == (
        kind not in USES_ALL
    )
    assert all(parameter.grad is None for parameter in model.parameters())


def wait_for_ever(processes: Processes) -> None:
    """Process 1 fails, but stays; process 0 waits for it in an exchange."""
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
        return
    assert processes.place(torch.device("cuda")) == torch.device("cuda", index)
    assert os.environ["LOCAL_RANK"] == str(index)
    assert processes.place(torch.device("cpu")) == torch.device("cpu")
