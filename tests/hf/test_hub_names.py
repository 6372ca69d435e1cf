"""A hub name: downloaded where a hub answers, read from the cache where none does, one line where there is neither."""

import hashlib
import json
import threading
import time
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

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        path = self.path.split("?")[0]
        resolve = f"/{NAME}/resolve/"
        body, status, headers = b"", 404, {}
        if path == "/":
            status = 200
        elif path.startswith(f"/api/models/{NAME}/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(text), "oid": COMMIT} for name, text in self.files.items()
            ]
            body, status = json.dumps(tree).encode(), 200
        elif path.startswith(f"/api/models/{NAME}"):
            siblings = [{"rfilename": name} for name in self.files]
            body, status = json.dumps({"id": NAME, "sha": COMMIT, "siblings": siblings}).encode(), 200
        elif path.startswith(resolve) and path.removeprefix(resolve).split("/", 1)[1] in self.files:
            revision, name = path.removeprefix(resolve).split("/", 1)
            body, status = self.files[name], 200
            headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
            if with_body:
                self.asked.append(f"{revision}/{name}")
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

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
    assert {name.split("/", 1)[1] for name in server.asked} == wanted
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


def test_out_of_reach_is_one_line_at_once(cache, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    begin = time.monotonic()
    with pytest.raises(UserError) as refused:
        load_pythia("EleutherAI/pythia-70m")
    assert time.monotonic() - begin < 3
    message = str(refused.value)
    assert "\n" not in message
    for part in ("EleutherAI/pythia-70m", "out of reach", "save_pretrained", "export_pythia", "--format gpt_neox"):
        assert part in message


def test_a_name_that_no_hub_has(cache, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, message in (("no such name", "neither a directory nor a hub name"), ("./none", "no such directory")):
        with pytest.raises(UserError, match=message):
            load_pythia(name)
