"""The compiled kernels: what they are given, and which file is loaded."""

import functools
import importlib.util
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_cases import STACKS, assert_same, build_model, draw, text_ids
from new_llm.models import ops
from new_llm.models.layers.pythia import apply_rotary, compute_rotary_angles
from new_llm.models.ops import local_attention
from new_llm.models.ops.head_loss import linear_cross_entropy
from new_llm.models.ops.kernels import SWITCH, build, check_tensor, native
from new_llm.models.ops.kernels.native import PythiaStep
from new_llm.models.ops.local_attention import attend_heads, can_split_heads, causal_attention
from tiny import ROOT, run_python

needs_compiler = pytest.mark.skipif(not native.has_kernels(), reason="no C compiler here")


@needs_compiler
@pytest.mark.parametrize("length", [1, 7, 8, 9, 20])
def test_causal_attention_in_bfloat16_is_near_torch_s_in_float64(length, monkeypatch):
    """With its gradients, in small blocks; queries, keys and values lie side by side, as a layer's do."""
    for name, value in (("MIN_SCORES", 0), ("BLOCK_QUERIES", 8), ("BLOCK_SCORES", 2 * 8 * 2 * 20)):
        monkeypatch.setattr(local_attention, name, value)

    def attend(function, mixed: Tensor) -> Tensor:
        return function(*mixed.transpose(1, 2).chunk(3, dim=-1))

    torchs = functools.partial(F.scaled_dot_product_attention, is_causal=True)
    fast, exact = (functools.partial(attend, function) for function in (causal_attention, torchs))
    mixed = draw(3, length, 2, 3 * 16, seed=length, dtype=torch.bfloat16)
    assert_same(fast, exact, [mixed], 0.01, exact=[mixed.double()])


@needs_compiler
@pytest.mark.parametrize(("length", "width", "rotary"), [(1, 6, 6), (7, 5, 2), (17, 16, 0), (64, 32, 8), (50, 48, 4)])
def test_heads_are_rotated_and_attend_as_by_torch_in_float64(length, width, rotary, monkeypatch):
    """With gradients, in one pass and in several; each head's queries, keys and values lie side by side."""
    monkeypatch.setattr(local_attention, "MIN_SCORES", 0)
    angles = torch.stack(compute_rotary_angles(torch.arange(length), rotary, 1e4, torch.float32))

    def attend(mixed: Tensor) -> Tensor:
        q, k, v = mixed.unflatten(-1, (3, -1)).transpose(1, 2).chunk(3, dim=-1)
        q, k = (apply_rotary(t, *angles.double()) for t in (q, k))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    mixed = draw(2, length, 3 * 3 * width, seed=length, dtype=torch.bfloat16)
    assert can_split_heads(mixed)
    assert_same(lambda x: attend_heads(x, 3, angles), attend, [mixed], 0.01, exact=[mixed.double()])


@needs_compiler
@pytest.mark.parametrize(
    ("length", "heads", "width", "size"), [(1, 2, 16, 3), (33, 2, 32, 4), (64, 1, 128, 8), (5, 3, 20, 1)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gated_delta_heads_are_as_by_torch_in_float64(length, heads, width, size, dtype):
    """Convolved, mapped and scaled; then normalised and gated. With all gradients."""

    def convolve(x: Tensor, before: Tensor, weight: Tensor) -> Tensor:
        y = F.conv1d(torch.cat((before, x), 1).transpose(1, 2), weight.unsqueeze(1), groups=len(weight))
        q, k, v = F.silu(y).transpose(1, 2).unflatten(-1, (3, heads, width)).permute(2, 0, 3, 1, 4)
        return torch.stack((0.3 * F.normalize(q, dim=-1), F.normalize(k, dim=-1), v))

    def gate(reads: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        return F.rms_norm(reads, (width,), weight, 1e-5).transpose(1, 2).flatten(2) * F.silu(x)

    x, gates = draw(2, length, 3 * heads * width).to(dtype), draw(2, length, heads * width, seed=1).to(dtype)
    shapes = (2, size - 1, 3 * heads * width), (3 * heads * width, size), (2, heads, length, width), (width,)
    before, taps, reads, weight = (draw(*shape, seed=seed, dtype=torch.float32) for seed, shape in enumerate(shapes, 2))
    tolerance = 1e-5 if dtype == torch.float32 else 0.01
    for fast, exact, given in (
        (lambda *parts: torch.stack(ops.convolve_heads(*parts, heads, 0.3)), convolve, [x, before, taps]),
        (lambda *parts: ops.gate_heads(*parts, 1e-5), gate, [reads, weight, gates]),
    ):
        assert_same(fast, exact, given, tolerance, exact=[t.double() for t in given])


@needs_compiler
@pytest.mark.parametrize("width", [8, 40, 128])
def test_what_a_block_computes_between_products_is_as_by_torch_in_float64(width):
    """LayerNorm, rounded to bfloat16 under autocast, and the sum of a block's parts; with all gradients."""
    norm, parts = nn.LayerNorm(width), [draw(3, 5, width, seed=seed, dtype=torch.float32) for seed in range(3)]

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        del norm.weight, norm.bias
        norm.weight, norm.bias = weight, bias
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return local_attention.normalize(norm, x)

    given = [parts[0], parts[1][0, 0], parts[2][0, 0]]
    exact = [t.double() for t in given]
    assert_same(run, lambda x, w, b: F.layer_norm(x, (width,), w, b), given, 0.01, exact=exact)
    given = [parts[0].bfloat16(), parts[1].bfloat16(), parts[2]]
    assert_same(local_attention.add_parts, lambda *t: sum(t), given, 0.01, exact=[t.double() for t in given])


@needs_compiler
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_default_dtype_has_no_say(default):
    """Each of these writes to a tensor of its own making, which is float32 whatever torch's default is."""
    model = build_model(STACKS["pythia"], segment_length=48, dtype=torch.float32).eval()
    ids = text_ids(1, 40)
    hidden, weight = torch.randn(1024, 8), torch.randn(1024, 8)
    targets = torch.randint(1024, (1024,))
    q, k, v = torch.randn(3, 1, 4, 300, 16).bfloat16().requires_grad_().unbind(0)

    def run() -> list[Tensor]:
        attended = causal_attention(q, k, v)
        attended.float().sum().backward(retain_graph=True)
        return [
            model.generate(ids, max_new_tokens=30, seed=0)[0],
            linear_cross_entropy(hidden, weight, targets),
            attended.detach(),
        ]

    expected = run()
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        found = run()
    finally:
        torch.set_default_dtype(before)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def make_step(**changed) -> PythiaStep:
    shapes = {"qkv": (16, 48), "dense": (16, 16), "up": (16, 24), "down": (24, 16)}
    linears = [changed.pop(name, nn.Linear(*shape)) for name, shape in shapes.items()]
    given = {"norms": [nn.LayerNorm(16) for _ in range(2)], "linears": linears, "num_heads": 2, "rotary_dim": 4}
    return PythiaStep(**given | changed)


@needs_compiler
def test_tensors_that_do_not_fit_are_refused():
    for words, changed in {
        "3 heads": {"num_heads": 3},
        "10 rotary": {"rotary_dim": 10},
        r"dense_h_to_4h\.weight: \[24, 15\]": {"up": nn.Linear(15, 24)},
        "dense.weight.*float64": {"dense": nn.Linear(16, 16).double()},
    }.items():
        with pytest.raises(ValueError, match=words):
            make_step(**changed)
    step, cache = make_step(), torch.zeros(2, 2, 5, 8)
    fitting = {
        "hidden": torch.zeros(2, 1, 16),
        "keys": cache,
        "values": cache.clone(),
        "positions": torch.tensor([[0], [3]]),
        "valid": None,
        "angles": (torch.zeros(2, 4), torch.zeros(2, 4)),
        "longest": 4,
    }
    assert step.run(**fitting).shape == (2, 1, 16)
    kernels = native.load_kernels()
    scores, sums = torch.zeros(2, 3, 8).bfloat16(), torch.zeros(2, 3)
    targets = torch.zeros(3, dtype=torch.int64)
    for words, call in {
        r"keys: \[2, 2, 5, 4\]": lambda: step.run(**fitting | {"keys": torch.zeros(2, 2, 5, 4)}),
        r"positions \[0, 4\]": lambda: step.run(**fitting | {"positions": torch.tensor([[0], [4]])}),
        "longest of 6": lambda: step.run(**fitting | {"longest": 6}),
        "valid": lambda: step.run(**fitting | {"valid": torch.ones(3, 1, dtype=torch.bool)}),
        "targets": lambda: native.score_rows(kernels, torch.zeros(4, 9), targets, None, write_gradients=False),
        "logsumexp": lambda: native.causal_softmax(kernels, scores, torch.zeros(2, 2), first=0, scale=1.0),
        "do not fit within 8 columns": lambda: native.causal_softmax(kernels, scores, sums, first=6, scale=1.0),
        "gradients": lambda: native.causal_softmax_backward(
            kernels, scores, torch.zeros(2, 3, 7).bfloat16(), sums, first=0, scale=1.0
        ),
        "mixed": lambda: native.split_heads(kernels, torch.zeros(1, 4, 24), 2, torch.zeros(2, 4, 2)),
        "angles": lambda: native.split_heads(kernels, torch.zeros(1, 4, 24).bfloat16(), 2, torch.zeros(2, 4, 6)),
        r"x: \[1, 7\]": lambda: native.LinearRows(nn.Linear(8, 5))(torch.zeros(1, 7)),
        "on cpu": lambda: check_tensor("state", torch.zeros(2), (2,), torch.float32, torch.device("cuda", 0)),
    }.items():
        with pytest.raises(ValueError, match=words):
            call()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the user's own, and another for temporary files."""
    for name, variable in (("cache", "XDG_CACHE_HOME"), ("temporary", "TMPDIR")):
        (tmp_path / name).mkdir(mode=0o700)
        monkeypatch.setenv(variable, str(tmp_path / name))
    monkeypatch.setattr("tempfile.tempdir", None)
    tmp_path.chmod(0o700)
    return tmp_path / "cache" / "new-llm-kernels"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every compilation; a copy of the session's own library stands in for it."""
    library = build.find_library(next(iter(build._list_places())), build._describe_build()[0])
    made: list[Path] = []

    def compile_kernels(folder: Path, *_: object) -> Path:
        made.append(folder)
        return Path(shutil.copy(library, folder / "kernels.so"))

    monkeypatch.setattr(build, "_compile", compile_kernels)
    return made


@needs_compiler
@pytest.mark.parametrize("damage", ["truncated", "changed", "link", "writable by others", "empty"])
def test_a_damaged_library_is_never_loaded_and_is_compiled_again(compiled, home, damage, tmp_path):
    build.load_library()
    (path,) = home.glob("*.so")
    whole = path.read_bytes()
    if damage == "link":
        path.rename(tmp_path / "elsewhere.so")
        path.symlink_to(tmp_path / "elsewhere.so")
    elif damage == "writable by others":
        path.chmod(0o777)
    else:
        path.unlink()  # the file itself is mapped into this process, which would die of SIGBUS if it shrank
        path.write_bytes({"truncated": whole[:5000], "changed": whole[:-1] + b"\0x", "empty": b""}[damage])
    build.load_library()
    assert len(compiled) == 2
    (path,) = home.glob("*.so")
    assert path.read_bytes() == whole
    assert not path.is_symlink()


@needs_compiler
@pytest.mark.parametrize("fault", ["none", "mode", "parent", "owner", "link", "file"])
def test_a_library_is_compiled_once_into_a_folder_that_others_can_not_change(
    compiled, home, fault, tmp_path, monkeypatch
):
    """Else it goes to the folder for temporary files; where nothing is safe, each process compiles its own.

    In a shared cache anyone who knows the key could put a library, which would run whatever its writer likes.
    """
    monkeypatch.setenv("NEW_LLM_CACHE", str(tmp_path / "shared"))
    planted = tmp_path / "shared" / "native" / f"{build._describe_build()[0]}.so"
    planted.parent.mkdir(parents=True)
    planted.write_bytes(b"no library at all")
    if fault == "parent":
        home.parent.chmod(0o777)
    elif fault == "link":
        (tmp_path / "target").mkdir(mode=0o700)
        home.symlink_to(tmp_path / "target")
    elif fault == "file":
        home.touch()
    elif fault in ("mode", "owner"):
        home.mkdir(mode=0o755 if fault == "mode" else 0o700)
    if fault == "owner":
        mine = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    build.load_library()
    build.load_library()
    assert len(compiled) == (2 if fault == "owner" else 1)
    kept = [path.parent for path in tmp_path.rglob("*.so") if path != planted]
    elsewhere = tmp_path / "temporary" / f"new-llm-kernels-{os.geteuid()}"
    assert kept == {"owner": [], "none": [home]}.get(fault, [elsewhere])
    if fault == "none":
        assert stat.S_IMODE(home.stat().st_mode) == 0o700
        assert [path.suffix for path in home.iterdir()] == [".so"]


def test_turned_off_or_without_a_working_compiler_the_pytorch_form_stays(monkeypatch, home, caplog):
    monkeypatch.setenv(SWITCH, "0")
    assert native.load_kernels.__wrapped__() is None
    monkeypatch.delenv(SWITCH)
    caplog.set_level("DEBUG", logger=native.__name__)
    for compiler in ("false", "no-such-compiler-here"):
        monkeypatch.setenv("CC", compiler)
        assert native.load_kernels.__wrapped__() is None
    assert len(caplog.records) == 2
    assert not list(home.parent.rglob("*.so"))


UNDER_SANITIZERS = """
import pytest
from new_llm.models.ops.kernels import build
build.FLAGS += ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
build.BUILD_SECONDS = 600
raise SystemExit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *{files!r}]))
"""


@needs_compiler
@pytest.mark.slow
def test_the_kernels_read_and_write_nothing_but_their_tensors(tmp_path):
    """A build with address and undefined-behaviour sanitizers runs the tests of every kernel."""
    names = ("libasan.so", "libstdc++.so.6")  # the latter for exceptions that torch throws
    libraries = [subprocess.check_output(["cc", f"-print-file-name={name}"], text=True).strip() for name in names]
    if not all(Path(library).is_absolute() for library in libraries):
        pytest.skip("this compiler has no address sanitizer")
    here = Path(__file__).parent
    files = [str(here / "test_loss.py"), str(here.parent / "generation/test_step_weights.py")]
    mine = (
        test_the_default_dtype_has_no_say,
        test_causal_attention_in_bfloat16_is_near_torch_s_in_float64,
        test_heads_are_rotated_and_attend_as_by_torch_in_float64,
        test_gated_delta_heads_are_as_by_torch_in_float64,
        test_what_a_block_computes_between_products_is_as_by_torch_in_float64,
    )
    files += [f"{here / 'test_memory_ops.py'}::test_chunks_equal_the_rule_with_all_gradients"]
    files += [f"{__file__}::{test.__name__}" for test in mine]
    environment = {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "XDG_CACHE_HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    assert "skipped" not in run_python("-c", UNDER_SANITIZERS.format(files=files), **environment)


# The Triton kernels compiled for an H100, which needs no GPU: `pip install triton`, then `pytest` with this file

WITHOUT_GROUPS = {f"{name}_kernel" for name in ("loss", "plain", "inverse", "project", "attend", "recall", "merge")}
"""Kernels whose tiles are not multiplied by warp groups, or have too few rows for them."""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_bfloat16_up_to_512_wide_spills_nothing_sets_what_it_reads_and_multiplies_by_warp_groups():
    """In a process of its own, since other tests choose Triton's interpreter before they import it."""
    printed = run_python(ROOT / "benchmarks" / "kernel_figures.py", "--json", TRITON_INTERPRET="0")
    launches = [json.loads(line) for line in printed.splitlines()]
    assert {launch["kernel"] for launch in launches} == WITHOUT_GROUPS | {"delta_kernel", "attention_kernel"}
    assert {launch["case"].split(",")[0] for launch in launches} >= {f"K={width}" for width in (64, 128, 256, 512)}
    for launch in launches:
        assert launch["spilled_bytes"] == 0, launch
        assert not launch["unset"], launch  # a register of whatever was there before: addresses anywhere
        assert launch["shared_bytes"] <= 227 * 1024, launch  # which one program may have
        assert launch["wgmma"] or launch["kernel"] in WITHOUT_GROUPS, launch
        # one thread stores what another has loaded or will load, since their tiles are divided differently
        if launch["case"].startswith("2 memories"):
            assert launch["barriers"] >= (4 if "backward" in launch["case"] else 2), launch
        assert len(launch["grid"]) == 1, launch  # the other axes hold no more than 65,535
    assert max(launch["grid"][0] for launch in launches) >= 70_000
