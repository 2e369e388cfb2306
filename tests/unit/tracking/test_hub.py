"""Uploading to the hub: the hub's own client against a server of the test that speaks its protocol."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from dpo.errors import UserError
from dpo.tracking import hub
from dpo.tracking.hub import check_repository, push


class Hub(BaseHTTPRequestHandler):
    """What creating a repository and uploading a folder ask of the hub."""

    logged_in = True
    repositories: dict[str, bool] = {}  # noqa: RUF012
    files: dict[str, bytes] = {}  # noqa: RUF012

    def do_GET(self) -> None:
        if self.path == "/api/whoami-v2" and self.logged_in:
            self._answer(200, {"name": "user", "type": "user"})
        else:
            self._answer(401, {"error": "Invalid credentials"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if not self.logged_in:
            self._answer(401, {"error": "Invalid credentials"})
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization", "user"), asked["name"])))
            self.repositories.setdefault(name, asked.get("private") or asked.get("visibility") == "private")
            self._answer(200, {"url": f"http://{self.headers['Host']}/{name}", "id": name})
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            files = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in asked]
            self._answer(200, {"files": files})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._answer(
                200,
                {
                    "commitUrl": f"http://{self.headers['Host']}/user/name/commit/{'1' * 40}",
                    "commitOid": "1" * 40,
                },
            )
        else:
            self._answer(200, {})

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    made = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    endpoint = f"http://127.0.0.1:{made.server_port}"
    api = hub.HfApi
    monkeypatch.setattr(hub, "HfApi", lambda: api(endpoint=endpoint, token="hf_of_the_test"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(Hub, "repositories", {})
    monkeypatch.setattr(Hub, "files", {})
    yield Hub
    made.shutdown()
    made.server_close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("a card")
    return tmp_path


def test_the_model_arrives_in_a_private_repository(
    server: type[Hub], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_repository("user/name")
    push(model, "user/name")
    assert list(server.repositories.values()) == [True]
    assert server.files == {"config.json": b"{}", "README.md": b"a card"}
    (model / "README.md").write_text("a card with results")
    (model / "config.json").write_text("changed")
    push(model, "user/name", only="README.md")
    assert server.files == {"config.json": b"{}", "README.md": b"a card with results"}
    assert "uploaded README.md to the hub as user/name" in capsys.readouterr().out


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize(("name", "said"), [("a b/c", "a b/c"), ("x/y/z", "x/y/z")])
def test_a_name_that_the_hub_does_not_take_is_said_at_start(name: str, said: str) -> None:
    with pytest.raises(UserError, match=f"train.push_to_hub: {said}: .*log in"):
        check_repository(name)


def test_who_is_not_logged_in_learns_it_at_start_and_keeps_the_model_at_the_end(
    server: type[Hub], model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(server, "logged_in", False)
    with pytest.raises(UserError, match=r"train\.push_to_hub: user/name: .*hf auth login"):
        check_repository("user/name")
    push(model, "user/name")
    assert f"hf upload user/name {model}" in capsys.readouterr().out
