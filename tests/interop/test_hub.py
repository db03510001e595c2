"""Models by name, from a server that answers as the hub does."""

import hashlib
import http.server
import json
import pathlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from folders import assert_bit_equal, read_run, write_llama
from helpers import only_error
from huggingface_hub import constants

from tlm_jax import cli
from tlm_jax.distributed import mesh as mesh_lib
from tlm_jax.interop import importing

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "some-lab/small-model"


class _Hub(http.server.BaseHTTPRequestHandler):
    """Says which files a model has, and sends them."""

    folder: pathlib.Path
    sent: list[str]

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/api/models/some-lab/gated/revision/main":
            self._answer(403, b"", {"X-Error-Code": "GatedRepo"})
        elif path == f"/api/models/{NAME}/revision/nowhere":
            self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif path == f"/api/models/{NAME}/revision/main":
            self._answer(200, json.dumps({"id": NAME, "sha": COMMIT, "siblings": []}).encode())
        elif path == f"/api/models/{NAME}/tree/{COMMIT}":
            files = sorted(self.folder.iterdir())
            tree = [{"type": "file", "path": f.name, **self._about(f)} for f in files]
            self._answer(200, json.dumps(tree).encode())
        elif path.startswith(f"/{NAME}/resolve/{COMMIT}/"):
            file = self.folder / path.rpartition("/")[2]
            if self.command == "GET":
                self.sent.append(file.name)
            about = {"X-Repo-Commit": COMMIT, "ETag": f'"{self._about(file)["lfs"]["oid"]}"'}
            self._answer(200, file.read_bytes(), about)
        else:
            self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    def _about(self, file: pathlib.Path) -> dict[str, Any]:
        content = file.read_bytes()
        oid, size = hashlib.sha256(content).hexdigest(), len(content)
        return {"size": size, "oid": oid[:40], "lfs": {"oid": oid, "size": size, "pointerSize": 1}}

    def _answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def hub(
    bpe: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[http.server.ThreadingHTTPServer]:
    """A hub with one small Llama, and an empty cache."""
    write_llama(tmp_path / "model", bpe)
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"not wanted")
    _Hub.folder, _Hub.sent = tmp_path / "model", []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_model_by_its_name(
    hub: http.server.ThreadingHTTPServer,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Only files of use are sent; the folder says which commit; later no network is needed."""
    words = ["import", "--model", f"hf:{NAME}", "--out"]
    assert cli.main([*words, str(tmp_path / "run")]) == 0
    assert f"holds {NAME}@{COMMIT}" in " ".join(capsys.readouterr().out.split())
    assert sorted(_Hub.sent) == ["config.json", "model.safetensors", "tokenizer.json"]
    config, params = read_run(tmp_path / "run")
    assert config.name == "small-model"
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["source"]["file"] == f"{NAME}@{COMMIT}"
    importing.import_model(
        tmp_path / "model", tmp_path / "same", None, mesh_lib.single_device_mesh()
    )
    assert_bit_equal(params, read_run(tmp_path / "same")[1])

    for name, message in (
        (f"{NAME}@nowhere", "has no revision nowhere"),
        ("some-lab/gated", "is gated: accept its terms at http://127.0.0.1"),
        ("some-lab/none", "/some-lab/none does not exist, or needs a login"),
        ("a/b/c", "hf:a/b/c is not the name of a model; it must be hf:ORG/NAME"),
    ):
        assert cli.main([*words[:2], f"hf:{name}", "--out", str(tmp_path / "no")]) == 1
        assert message in only_error(capsys.readouterr().err)

    hub.shutdown()
    hub.server_close()
    assert cli.main([*words, str(tmp_path / "again")]) == 0
    capsys.readouterr()
    assert cli.main(["import", "--model", "hf:some-lab/other", "--out", str(tmp_path / "no")]) == 1
    error = only_error(capsys.readouterr().err)
    assert "hf:some-lab/other is not in the cache, and http://127.0.0.1" in error
    assert "run `hf download some-lab/other`" in error
    assert not (tmp_path / "no").exists()
