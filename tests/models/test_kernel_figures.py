"""The Triton kernels compiled for an H100, which needs no GPU: `pip install triton`, then `pytest` with this file.

In a process of its own, since other tests choose Triton's interpreter before they import it.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOKEN_KERNELS = {"project_kernel", "attend_kernel", "recall_kernel", "merge_kernel"}
WITHOUT_GROUPS = {"loss_kernel", "plain_kernel", "inverse_kernel"} | TOKEN_KERNELS
"""Kernels whose tiles are not multiplied by warp groups, or have too few rows for them."""
SHARED_BYTES = 227 * 1024
"""Shared memory that one program may have on an H100."""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_bfloat16_up_to_512_wide_spills_nothing_sets_what_it_reads_and_multiplies_by_warp_groups():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "benchmarks" / "kernel_figures.py"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    launches = [json.loads(line) for line in done.stdout.splitlines()]
    assert {launch["kernel"] for launch in launches} == {
        "delta_kernel",
        "plain_kernel",
        "inverse_kernel",
        "attention_kernel",
        "loss_kernel",
    } | TOKEN_KERNELS
    assert {launch["case"].split(",")[0] for launch in launches} >= {f"K={width}" for width in (64, 128, 256, 512)}
    for launch in launches:
        assert launch["spilled_bytes"] == 0, launch
        assert not launch["unset"], launch  # a register of whatever was there before: addresses anywhere
        assert launch["shared_bytes"] <= SHARED_BYTES, launch
        assert launch["wgmma"] or launch["kernel"] in WITHOUT_GROUPS, launch
        # one thread stores what another has loaded or will load, since their tiles are divided differently
        if launch["case"].startswith("2 memories"):
            assert launch["barriers"] >= (4 if "backward" in launch["case"] else 2), launch
        assert len(launch["grid"]) == 1, launch  # the other axes hold no more than 65,535
    assert max(launch["grid"][0] for launch in launches) >= 70_000
