"""A hub name: downloaded where a hub answers, read from the cache where none does, one line where there is neither."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from neox_folders import OLD_CONFIG, disk_weights, make_neox, write_folder

from new_llm.config import UserError
from new_llm.data import hub
from new_llm.models.hf import load_pythia

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
        body: bytes | None = {"/": b""}.get(path)
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
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the hub, and no environment that switches the hub off."""
    import huggingface_hub.constants

    folder = tmp_path / "hub-cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    hub._address_answers.cache_clear()
    return folder


@pytest.fixture
def server(cache, monkeypatch):
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
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    server.files.clear()
    again = load_pythia(NAME, revision="step3000")
    assert torch.equal(again.embed_in.weight, model.embed_in.weight)
    with pytest.raises(UserError, match="pythia-tiny is not cached here"):
        load_pythia(NAME, revision="step4000")


def test_a_repository_that_is_not_there(server):
    with pytest.raises(UserError, match=r"EleutherAI/pythia-none could not be loaded: .+; give a directory") as refused:
        load_pythia("EleutherAI/pythia-none")
    assert "\n" not in str(refused.value)


def test_names_without_a_hub_are_refused_in_one_line(cache, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for name, words in (
        ("EleutherAI/pythia-70m", "EleutherAI/pythia-70m .* out of reach: .*save_pretrained.*--format gpt_neox"),
        ("no such name", "neither a directory nor a hub name"),
        ("./none", "no such directory"),
    ):
        with pytest.raises(UserError, match=words) as refused:
            load_pythia(name)
        assert "\n" not in str(refused.value)
