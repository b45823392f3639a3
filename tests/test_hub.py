"""What is uploaded, and what is not, seen by an HTTP server that speaks the hub's protocol."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from llmquant import api
from llmquant.errors import LlmquantError, OutputError


class Hub(BaseHTTPRequestHandler):
    """Makes repositories, and takes commits with all files in them."""

    repos: dict[str, dict] = {}  # noqa: RUF012  (shared on purpose)

    def answer(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != "Bearer hf_right":
            return self.answer({"error": "Invalid username or password."}, 401)
        address = f"http://localhost:{self.server.server_port}"
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization', 'me')}/{asked['name']}"
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            known = name in self.repos
            self.repos.setdefault(name, {"private": private, "files": {}})
            return self.answer({"url": f"{address}/{name}"}, 409 if known else 200)
        name = "/".join(self.path.split("/")[3:5])
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            told = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            return self.answer({"files": told})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.repos[name]["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer(
                {"commitUrl": f"{address}/{name}/commit/1", "commitOid": "1" * 40, "pullRequestUrl": None}
            )
        return self.answer({})

    def do_GET(self):
        name = "/".join(self.path.partition("?")[0].split("/")[3:5])
        if name in self.repos:
            repo = {"id": name, "sha": "0" * 40, "private": self.repos[name]["private"], "siblings": [], "tags": []}
            return self.answer(repo)
        return self.answer({"error": "Repository not found"}, 404)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub():
    Hub.repos = {}
    server = ThreadingHTTPServer(("localhost", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://localhost:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def folder(llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("pushed") / "out"
    api.quantize(llama, "rtn-w4g128", out, changes=["grid.group_size=32"], evaluate=False)
    return out


def push(endpoint, *arguments, token="hf_right"):
    """Run the program, as the endpoint is read when huggingface_hub is imported."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0", "COLUMNS": "200"}
    command = [sys.executable, "-m", "llmquant", "push", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_every_file_of_a_finished_folder_arrives_as_it_is(folder, hub):
    (folder / "notes.txt").write_text("private thoughts")
    done = push(hub, folder, "me/model", "--private")
    (folder / "notes.txt").unlink()
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{hub}/me/model" in done.stdout
    assert Hub.repos["me/model"]["private"]
    assert Hub.repos["me/model"]["files"] == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_private_upload_never_goes_into_a_public_repository(folder, hub):
    Hub.repos = {"me/model": {"private": False, "files": {}}}
    done = push(hub, folder, "me/model", "--private")
    assert done.returncode == 2
    assert "is there already, and public" in done.stderr
    assert not Hub.repos["me/model"]["files"]


def test_a_wrong_token_and_a_hub_out_of_reach_are_one_clear_message(folder, hub):
    for endpoint, token, message in ((hub, "hf_wrong", "cannot be uploaded"), ("http://localhost:9", "hf_x", "me/m")):
        done = push(endpoint, folder, "me/m", token=token)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_no_token_is_said_before_anything_is_asked(folder, monkeypatch):
    monkeypatch.setattr("llmquant.hub.get_token", lambda: None)
    with pytest.raises(LlmquantError, match=r"there is no token .* HF_TOKEN"):
        api.push(folder, "me/model")


def test_only_finished_and_unchanged_folders_are_taken(folder, llama, tmp_path):
    with pytest.raises(OutputError, match="not a folder that llmquant has finished"):
        api.push(llama, "me/model")
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(OutputError, match=r"model\.safetensors: is not as llmquant wrote it"):
        api.push(copy, "me/model")
    (copy / "model.safetensors").unlink()
    with pytest.raises(OutputError, match=r"model\.safetensors: is missing"):
        api.push(copy, "me/model")


def test_of_several_formats_each_is_a_folder_of_its_own(llama, tmp_path, monkeypatch):
    changes = ["grid.group_size=32", "formats=[gptq, gptq_v2]"]
    api.quantize(llama, "rtn-w4g128", tmp_path / "out", changes=changes, evaluate=False)
    monkeypatch.setattr("llmquant.hub.get_token", lambda: None)
    with pytest.raises(OutputError, match=r"Give one of the folders in it, e\.g\. .*/out/gptq"):
        api.push(tmp_path / "out", "me/model")
    (tmp_path / "out" / "gptq_v2").rename(tmp_path / "renamed")
    with pytest.raises(LlmquantError, match="there is no token"):
        api.push(tmp_path / "renamed", "me/model")
