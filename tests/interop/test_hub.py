"""Downloads from a small server on this machine that speaks the hub's protocol; nothing leaves the machine."""

import hashlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed: pip install '.[hub]'")
NAME = "someone/small-model"
COMMITS = {"main": "a" * 40, "v1": "b" * 40}
FILES = {
    "config.json": b"{}",
    "sentencepiece.bpe.model": b"pieces",
    "model.safetensors": bytes(range(256)) * 4096,  # a megabyte, so that it comes in several parts
    "pytorch_model.bin": b"not needed",
    "rust_model.ot": b"not needed",
    "nested/config.json": b"not needed",
}


class Hub(http.server.ThreadingHTTPServer):
    """Serves one model; `cut` is how many bytes of the weights it sends before it breaks off, once for each entry."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests, self.cut, self.files = [], [], dict(FILES)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self.server_port}"

    def asked(self, method):
        return [path.rpartition("/")[2] for each, path, _ in self.requests if each == method and "/resolve/" in path]

    def handle_error(self, request, client_address):
        pass  # a connection that was broken off on purpose


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        path, _, _ = self.path.partition("?")
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"] and "/".join(parts[2:4]) == NAME:
            self.describe(parts[4:])
        elif "/".join(parts[:2]) == NAME and parts[2] == "resolve":
            self.send_file("/".join(parts[4:]), COMMITS.get(parts[3], parts[3]))
        else:
            self.send(404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})

    def describe(self, rest):
        files = self.server.files
        if rest[:1] == ["tree"]:
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in files.items()
            ]
            return self.send(200, json.dumps(tree).encode())
        revision = rest[1] if rest[:1] == ["revision"] else "main"
        commit = COMMITS.get(revision, revision)
        if commit not in COMMITS.values():
            return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        found = {"id": NAME, "modelId": NAME, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
        return self.send(200, json.dumps(found).encode())

    def send_file(self, name, commit):
        content = self.server.files.get(name)
        if content is None:
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        begin, status = 0, 200
        if wanted := self.headers.get("Range"):
            begin, status = int(wanted.removeprefix("bytes=").partition("-")[0]), 206
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        stop = len(content)
        if self.command == "GET" and name.endswith(".safetensors") and self.server.cut:
            stop = begin + self.server.cut.pop(0)
        return self.send(status, content[begin:], headers, send_only=stop - begin)

    def send(self, status, content, headers=(), send_only=None):
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:send_only])
        if send_only is not None and send_only < len(content):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True


@pytest.fixture
def hub():
    hub = Hub()
    yield hub
    hub.shutdown()
    hub.server_close()


@pytest.fixture
def fetch(tmp_path):
    """Downloads in a process of its own, since the address of the hub is read once; gives the folder or the error."""

    def fetch(endpoint, name=NAME, revision=""):
        program = (
            "import sys; from flax_transformer.interop.hub import download\n"
            "try:\n    print(download(*sys.argv[1:]))\n"
            "except ValueError as error:\n    print('error:', error)"
        )
        variables = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
        variables |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-c", program, name, revision]
        root = Path(__file__).parents[2]
        done = subprocess.run(
            command, env=os.environ | variables, capture_output=True, text=True, check=True, cwd=root, timeout=100
        )
        (line,) = done.stdout.splitlines()
        return line if line.startswith("error:") else Path(line)

    return fetch


def content_of(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_only_the_files_that_are_needed_are_downloaded_and_only_once(hub, fetch):
    folder = fetch(hub.endpoint)
    needed = ["config.json", "model.safetensors", "sentencepiece.bpe.model"]
    assert content_of(folder) == {name: FILES[name] for name in needed}
    assert sorted(hub.asked("GET")) == needed
    assert fetch(hub.endpoint) == folder and len(hub.asked("GET")) == len(needed)
    hub.shutdown()
    hub.server_close()
    assert fetch(hub.endpoint) == folder  # without a network the earlier download is used
    (folder / "model.safetensors").unlink()
    assert "the hub cannot be reached" in fetch(hub.endpoint)


def test_a_revision_can_be_chosen_and_an_unknown_one_is_an_error(hub, fetch):
    assert fetch(hub.endpoint, revision="v1").name == COMMITS["v1"]
    assert fetch(hub.endpoint, revision="v2") == (
        f"error: {NAME} has no revision 'v2' on the hub: give a branch, a tag or a commit"
    )


def test_a_transfer_that_breaks_off_goes_on_where_it_stopped(hub, fetch):
    whole = hub.files["model.safetensors"] = bytes(range(256)) * 100_000
    hub.cut = [12_000_000, 11_000_000]
    assert (fetch(hub.endpoint) / "model.safetensors").read_bytes() == whole
    ranges = [wanted for method, path, wanted in hub.requests if method == "GET" and path.endswith(".safetensors")]
    begun = [0 if wanted is None else int(wanted.removeprefix("bytes=").rstrip("-")) for wanted in ranges]
    assert len(begun) == 3 and 0 == begun[0] < begun[1] < begun[2] < len(whole)


@pytest.mark.slow  # `huggingface_hub` tries for ten seconds
def test_a_download_that_failed_goes_on_with_the_files_that_lack(hub, fetch):
    hub.cut = [0] * 20
    assert fetch(hub.endpoint).startswith(f"error: the download of {NAME} stopped")
    hub.cut, hub.requests = [], []
    assert (fetch(hub.endpoint) / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert "config.json" not in hub.asked("GET")


def test_an_unknown_model_and_one_without_weights_are_errors(hub, fetch):
    assert "no model someone/else on the hub" in fetch(hub.endpoint, "someone/else")
    hub.files = {"config.json": b"{}", "rust_model.ot": b""}
    assert "has neither model.safetensors nor pytorch_model.bin" in fetch(hub.endpoint)
    assert hub.asked("GET") == []


def test_without_a_network_there_is_one_line_at_once(fetch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begun = time.monotonic()
    said = fetch(f"http://127.0.0.1:{port}")
    assert said.startswith(f"error: there is no folder {NAME} here, and the hub cannot be reached (ConnectError")
    assert said.endswith("or download all files of the model elsewhere and give their folder")
    assert time.monotonic() - begun < 20


def test_without_its_package_a_download_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    from flax_transformer.interop.hub import download

    with pytest.raises(ValueError, match=r"pip install 'flax_transformer\[hub\]'"):
        download("someone/model", "")
