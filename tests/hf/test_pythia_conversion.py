"""GPT-NeoX checkpoints in and out, bit for bit, in the layouts of every version, from folders and from the hub."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from model_cases import assert_near, get_model, randomize, text_ids
from new_llm.config import PythiaConfig, UserError
from new_llm.data import get_tokenizer, hub
from new_llm.data.tokenizer import train_tokenizer
from new_llm.models import TransformerLM, create_model, save_model
from new_llm.models.hf import export_pythia, load_pythia
from new_llm.models.layers import InfiniLayer, PythiaLayer
from tiny import make_shape, refused

SHAPE = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "layer_norm_eps": 1e-4,
    "initializer_range": 0.03,
}
ROTARY = {"rotary_pct": 0.5, "rotary_emb_base": 500}  # not the defaults, which a reader could fall back to
OLD_CONFIG = {
    **SHAPE,
    **ROTARY,
    "architectures": ["GPTNeoXForCausalLM"],
    "model_type": "gpt_neox",
    "hidden_act": "gelu",
    "bos_token_id": 0,
    "eos_token_id": 0,
    "tie_word_embeddings": False,
    "use_parallel_residual": True,
    "torch_dtype": "float16",
    "transformers_version": "4.24.0",
}
NEW_CONFIG = {
    **{key: value for key, value in OLD_CONFIG.items() if key not in (*ROTARY, "torch_dtype")},
    "attention_bias": True,
    "attention_dropout": 0.0,
    "dtype": "float16",
    "rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 500, "rope_type": "default"},
    "transformers_version": "5.0.0",
}


def make_neox(seed: int = 3, **changes: Any) -> GPTNeoXForCausalLM:
    config = GPTNeoXConfig(**{**SHAPE, **ROTARY, "hidden_act": "gelu", "tie_word_embeddings": False, **changes})
    model = GPTNeoXForCausalLM(config)
    randomize(model, seed)
    return model.eval()


def disk_weights(model: GPTNeoXForCausalLM, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The weights by the names that all versions write to disk."""
    return {
        name.replace("lm_head", "embed_out"): value.to(dtype).clone()
        for name, value in model.state_dict().items()
        if not name.endswith("inv_freq")
    }


def write_folder(folder: Path, config: dict[str, Any], weights: dict[str, Tensor], kind: str = "safetensors") -> Path:
    """Write a checkpoint: kind is safetensors, bin, safetensors-sharded or bin-sharded."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    ending, is_sharded = kind.removesuffix("-sharded"), kind.endswith("-sharded")
    stem = "model" if ending == "safetensors" else "pytorch_model"
    names = sorted(weights)
    parts = [names[:7], names[7:]] if is_sharded else [names]
    places: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        file = f"{stem}-0000{number}-of-00002.{ending}" if is_sharded else f"{stem}.{ending}"
        chosen = {name: weights[name].contiguous() for name in part}
        if ending == "safetensors":
            save_file(chosen, folder / file, metadata={"format": "pt"})
        else:
            torch.save(chosen, folder / file)
        places |= dict.fromkeys(part, file)
    if is_sharded:
        index = {"metadata": {"total_size": 0}, "weight_map": places}
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
    return folder


NEOX = make_neox()


@pytest.mark.parametrize("config", [OLD_CONFIG, NEW_CONFIG], ids=["old", "new"])
@pytest.mark.parametrize("kind", ["safetensors", "bin", "safetensors-sharded", "bin-sharded"])
def test_both_layouts_give_hugging_faces_logits(tmp_path, config, kind):
    weights = disk_weights(NEOX)
    if config is OLD_CONFIG:  # the constants that versions of 2022 stored beside the weights
        for layer in range(SHAPE["num_hidden_layers"]):
            prefix = f"gpt_neox.layers.{layer}.attention."
            weights[prefix + "bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
            weights[prefix + "masked_bias"] = torch.tensor(-1e9)
            weights[prefix + "rotary_emb.inv_freq"] = torch.rand(2)
    elif kind == "bin":  # the head by its name in memory
        weights["lm_head.weight"] = weights.pop("embed_out.weight")
    model = load_pythia(write_folder(tmp_path, config, weights, kind)).eval()
    assert model.segment_length == 64
    ids = text_ids(2, 64)
    with torch.no_grad():
        assert_near(model(ids), NEOX(ids).logits, 1e-5)
    if kind == "bin":  # the installed version's own folder, in segments
        NEOX.save_pretrained(tmp_path / "installed")
        model = load_pythia(str(tmp_path / "installed"), segment_length=16).eval()
        with torch.no_grad():
            assert_near(model(ids)[:, 16:32], NEOX(ids[:, 16:32]).logits, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_import_export_import_is_bit_identical(tmp_path, dtype):
    weights = disk_weights(NEOX, dtype)
    first = load_pythia(write_folder(tmp_path / "theirs", OLD_CONFIG, weights))
    assert first.embed_in.weight.dtype == dtype
    assert all(parameter.requires_grad and parameter.device.type == "cpu" for parameter in first.parameters())
    export_pythia(first, tmp_path / "ours")
    torch.testing.assert_close(load_pythia(tmp_path / "ours").state_dict(), first.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(load_file(tmp_path / "ours" / "model.safetensors"), weights, rtol=0, atol=0)


REFUSED = {
    "model_type 'llama'; only 'gpt_neox'": {"model_type": "llama"},
    "AutoModelForCausalLM.from_pretrained loads it": {"model_type": "new_llm"},
    "use_parallel_residual is False": {"use_parallel_residual": False},
    "hidden_act is 'gelu_fast'; Pythia layers only support 'gelu'": {"hidden_act": "gelu_fast"},
    "embed_out.weight differs from embed_in.weight": {"tie_word_embeddings": True},
    "rope_scaling of type 'linear'": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "rope_parameters of type 'yarn'": {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
    "hidden_size missing": {"hidden_size": None},
    "rotates 3 dimensions": {"rotary_pct": 0.4},
    "32 is not a multiple of num_attention_heads": {"num_attention_heads": 5},
    "weights not GPT-NeoX's: layers.2": {"num_hidden_layers": 2},
    "weights missing: embed_in.weight": {"gpt_neox.embed_in.weight": None},
    "weights not GPT-NeoX's: lm.head": {"lm.head": torch.zeros(2)},
    "duplicate weight embed_out.weight": {"lm_head.weight": torch.zeros(128, 32)},
    "final_layer_norm.bias has shape (3,)": {"gpt_neox.final_layer_norm.bias": torch.zeros(3)},
}
"""Keys of the configuration, or weights by their names."""


@pytest.mark.parametrize(("message", "changes"), REFUSED.items(), ids=REFUSED)
def test_what_our_layers_can_not_represent_is_one_line(tmp_path, message, changes):
    is_weight = any("." in name for name in changes)
    weights = disk_weights(NEOX) | (changes if is_weight else {})
    config = OLD_CONFIG | ({} if is_weight else changes)
    folder = write_folder(tmp_path, config, {name: t for name, t in weights.items() if t is not None})
    with refused(re.escape(message)):
        load_pythia(folder)


def test_folders_without_a_checkpoint(tmp_path):
    folder = write_folder(tmp_path / "broken", OLD_CONFIG, disk_weights(NEOX))
    save_model(get_model("pythia"), tmp_path / "saved")
    (folder / "model.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="not a safetensors file"):
        load_pythia(folder)
    (folder / "model.safetensors").unlink()
    for name, message in (("broken", "no weights here"), ("nowhere", "no such directory"), ("saved", "load_model")):
        with pytest.raises(UserError, match=message):
            load_pythia(tmp_path / name)


def test_gpt_neox_has_no_memory_and_one_pass(tmp_path):
    selective = create_model(
        "selective",
        make_shape(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8),
    )
    odd = TransformerLM([PythiaLayer(16, 2, 24), PythiaLayer(16, 1, 24)], 8)
    for model, message in (
        (get_model("mixed"), r"no layers like 0 \(InfiniLayer\), 2 \(MultiMemoryLayer\)"),
        (selective, "this model runs them 2 times"),
        (odd, "this model's differ"),
    ):
        with refused(f"{message}.*save_pretrained"):
            export_pythia(model, tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("choice", "heads"),
    [
        ("infini", 1),
        ({"kind": "infini", "num_memory_heads": 2, "num_memory_banks": 2}, 2),
        ("multi_memory", 4),
        ({"kind": "hierarchical", "num_memory_heads": 8}, 8),
        (InfiniLayer(32, 4, 40, num_memory_heads=4, layer_norm_eps=1e-4), 4),
    ],
    ids=["infini", "options", "multi_memory", "hierarchical", "layer"],
)
def test_a_swapped_layer_takes_over_what_fits(tmp_path, choice, heads):
    def split_fused(weight: Tensor, heads: int) -> Tensor:
        """All of q, all of k, all of v of a fused projection, which has them head by head."""
        return weight.unflatten(0, (heads, 3, -1)).movedim(1, 0).flatten(1, 2)

    folder = write_folder(tmp_path, OLD_CONFIG, disk_weights(NEOX, torch.bfloat16))
    plain = load_pythia(folder)
    torch.manual_seed(5)
    model = load_pythia(folder, replace_layers={1: choice}, segment_length=8)
    assert [layer.kind for layer in model.layer_list][::2] == ["pythia", "pythia"]
    assert list(model.memory_layers) == [1]
    ours, theirs = model.state_dict(), plain.state_dict()
    for name, value in theirs.items():
        if "layers.1.attention.query_key_value" in name:
            assert torch.equal(split_fused(ours[name], heads), split_fused(value, 4)), name
        else:
            assert torch.equal(ours[name], value), name
    assert {value.dtype for value in ours.values()} == {torch.bfloat16}
    assert model.layers[1].settings["layer_norm_eps"] == 1e-4
    model(text_ids(2, 20), update_memory=True)
    assert int(model.get_memory_state()[1]["segment_counter"]) == 3
    beside = load_pythia(folder, replace_layers={1: "parallel_infini"})  # which keeps its layer; α begins at 0
    assert torch.equal(beside(text_ids(2, 20)), plain(text_ids(2, 20)))


def test_swaps_out_of_range_are_named(tmp_path):
    folder = write_folder(tmp_path, OLD_CONFIG, disk_weights(NEOX))
    for choices, message in (
        ({3: "infini"}, "no layer 3; the model has 0 to 2"),
        ({-1: "infini"}, "no layer -1"),
        ({0: "lstm"}, "unknown kind 'lstm'; allowed are"),
        ({0: {"kind": "infini", "num_banks": 2}}, "layer 0: .*num_banks"),
        ({0: InfiniLayer(16, 2, 24)}, "hidden size 16, but the checkpoint's is 32"),
        ({1: "token_memory"}, "token_memory stands before the head and must be among the last, not at 1"),
    ):
        with pytest.raises(ValueError, match=message):
            load_pythia(folder, replace_layers=choices)
    with pytest.raises(ValueError, match="allowed are 1 to max_position_embeddings"):
        load_pythia(folder, segment_length=65)


TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-7}
SHAPES = {
    "quarter-rotary": {"rotary_pct": 0.25},
    "half-rotary": {"hidden_size": 48, "num_attention_heads": 3, "rotary_emb_base": 10_000, "layer_norm_eps": 1e-3},
    "full-rotary": {"num_attention_heads": 2, "rotary_pct": 1.0},
    "one-head-one-layer": {"hidden_size": 16, "num_attention_heads": 1, "num_hidden_layers": 1},
}


def our_name(name: str) -> str:
    return name.removeprefix("gpt_neox.").replace("lm_head", "embed_out")


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_and_gradients_equal_hugging_face(shape, dtype):
    theirs = make_neox(**shape)
    ours = create_model("pythia", PythiaConfig(**{**SHAPE, **ROTARY, **shape}))
    ours.load_state_dict({our_name(name): value for name, value in disk_weights(theirs).items()})
    ours, theirs = ours.to(dtype).eval(), theirs.to(dtype)
    for batch, length in ((1, 1), (2, 7), (1, 64), (3, 33)):
        ids = text_ids(batch, length)
        with torch.no_grad():
            assert_near(ours(ids), theirs(ids).logits, TOLERANCES[dtype])
    loss, statistics = ours.compute_loss(ids, ids)
    their_loss = theirs(ids, labels=ids).loss
    torch.testing.assert_close(loss, their_loss.to(dtype), atol=1e-6, rtol=1e-6)  # theirs is a float32 loss
    assert statistics.num_tokens == 3 * 32
    expected = torch.autograd.grad(theirs(ids).logits.square().mean(), list(theirs.parameters()))
    names = [our_name(name) for name, _ in theirs.named_parameters()]
    parameters = dict(ours.named_parameters())
    assert parameters.keys() == set(names)
    actual = torch.autograd.grad(ours(ids).square().mean(), [parameters[name] for name in names])
    for one, other in zip(actual, expected, strict=True):
        assert_near(one, other, TOLERANCES[dtype])


# A hub name: downloaded where a hub answers, read from the cache where none does, one line where there is neither


NAME = "EleutherAI/pythia-tiny"
COMMIT = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """As much of a hub as a download needs: the repository's description and its files."""

    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        path, headers = self.path.split("?")[0], {}
        tree = [{"type": "file", "path": name, "size": len(text), "oid": COMMIT} for name, text in self.files.items()]
        siblings = [{"rfilename": name} for name in self.files]
        body = {"/": b""}.get(path)
        if path.startswith(f"/api/models/{NAME}/tree/"):
            body = json.dumps(tree).encode()
        elif path.startswith(f"/api/models/{NAME}"):
            body = json.dumps({"id": NAME, "sha": COMMIT, "siblings": siblings}).encode()
        elif path.startswith(f"/{NAME}/resolve/"):
            body = self.files.get(path.split("/")[-1])
        if body is not None and "/resolve/" in path:
            headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
            if self.command == "GET":
                self.asked.append(path.split("/")[-1])
        self.send_response(404 if body is None else 200)
        for key, value in {**headers, "Content-Length": str(len(body or b""))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body or b"")

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A hub, an empty cache of it, and no environment that switches the hub off."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    hub._address_answers.cache_clear()
    Hub.files, Hub.asked = {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield Hub
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("kind", ["safetensors", "safetensors-sharded", "bin"])
def test_a_repository_is_downloaded_and_read_again_without_the_hub(tmp_path, server, monkeypatch, kind):
    weights = disk_weights(make_neox())
    for path in write_folder(tmp_path / "repository", OLD_CONFIG, weights, kind).iterdir():
        server.files[path.name] = path.read_bytes()
    wanted = set(server.files)
    server.files |= {"flax_model.msgpack": b"not wanted"}
    if kind == "safetensors":
        server.files |= {"pytorch_model.bin": b"not wanted"}
    model = load_pythia(NAME, revision="step3000")
    assert torch.equal(model.embed_in.weight, weights["gpt_neox.embed_in.weight"])
    assert set(server.asked) == wanted
    server.files["tokenizer.json"] = train_tokenizer(["a text"], 300).to_str().encode()
    get_tokenizer(NAME, revision="step3000")
    with refused(r"EleutherAI/pythia-none could not be loaded: .+; give a directory"):
        load_pythia("EleutherAI/pythia-none")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    server.files.clear()
    assert torch.equal(load_pythia(NAME, revision="step3000").embed_in.weight, model.embed_in.weight)
    assert get_tokenizer(NAME, revision="step3000").get_vocab_size() < 300
    for load, why in ((load_pythia, "pythia-tiny is not a directory, is not"), (get_tokenizer, "is not cached here")):
        with pytest.raises(UserError, match=why):
            load(NAME, revision="step4000")


def test_names_without_a_hub_are_refused_in_one_line(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    for name, words in (
        (
            "EleutherAI/pythia-70m",
            "^EleutherAI/pythia-70m is not .* out of reach; .*save_pretrained.*--format gpt_neox",
        ),
        ("no such name", "neither a directory nor a hub name"),
        ("./none", "no such directory"),
    ):
        with refused(words):
            load_pythia(name)
