"""The sampler `endpoint` through the command: against a server here, and one that the command starts."""

import itertools
import json
import shlex
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from fake_server import FakeServer, fails, serving
from tiny import make_tiny_model

from data_prep import serve
from data_prep.cli import main

LENGTH = shlex.join(
    ["command:" + sys.executable, "-c", "import sys; [print(len(line)) for line in sys.stdin]"]
)
ANY_MODEL = ("--endpoint_tolerance", "1000")
SERVER = """
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def reply(self, answer):
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
    def do_GET(self): self.reply({"data": [{"id": sys.argv[1]}]})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = "x" * (body["seed"] % 50)
        logprobs = {"token_logprobs": [-1]}
        self.reply({"choices": [{"text": text, "finish_reason": "stop", "logprobs": logprobs}]})
HTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("\n".join(f"{number} cats sat on the mat, a good day" for number in range(40)))
    return file


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    numbers = itertools.count()

    def answer(_: Mapping[str, Any]) -> Any:
        number = next(numbers)
        reason = "length" if number % 4 == 0 else "stop"
        logprobs = {"token_logprobs": [-1.0]}
        return {"choices": [{"text": "x" * number, "finish_reason": reason, "logprobs": logprobs}]}

    with serving(FakeServer(answer=answer)) as made:
        yield made


def run(policy: Path, text: Path, output: Path, *options: str) -> int:
    given = ["--model", str(policy), "--output", str(output), "--scorer", LENGTH, "--sampler", "endpoint"]
    few = "--dtype float32 --num_samples 4 --completion_tokens 3 --prompt_tokens 6 --num_prompts 5"
    return main(["sample", str(text), *given, *few.split(), "--num_test_prompts", "2", *options])


def test_a_servers_continuations_become_groups(
    policy: Path, text: Path, tmp_path: Path, fake: FakeServer
) -> None:
    fake.faults += [fails(429)]
    out = tmp_path / "out"
    one_by_one = ("--requests_in_flight", "1", "--only_finished")
    assert run(policy, text, out, "--endpoint", fake.url, *ANY_MODEL, *one_by_one) == 0
    rows = [pq.read_table(out / f"{split}.parquet").to_pylist() for split in ("train", "test")]
    assert [len(part) for part in rows] == [5, 2]
    assert {len(row["completions"]) for part in rows for row in part} == {3}  # one in four was cut
    source = json.loads((out / "manifest.json").read_text())["source"]
    assert source["sampler"] == "endpoint"


def test_the_command_starts_a_server_with_the_policy_and_ends_it(
    policy: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(serve, "POLL", 0.1)
    (tmp_path / "server.py").write_text(SERVER)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, command = f"http://127.0.0.1:{port}", f"{sys.executable} {tmp_path / 'server.py'} {{model}} {port}"
    options = ("--endpoint", url, "--endpoint_model", str(policy), *ANY_MODEL)
    assert run(policy, text, tmp_path / "out", *options, "--serve", command) == 0
    assert (tmp_path / "out" / "train.parquet").is_file()
    assert run(policy, text, tmp_path / "out", *options, "--overwrite") == 2  # it has ended
    assert "no connection" in capfd.readouterr().err


def test_a_server_that_does_not_start_or_is_there_already(
    policy: Path, text: Path, tmp_path: Path, fake: FakeServer, capfd: pytest.CaptureFixture[str]
) -> None:
    down = ("--endpoint", "http://127.0.0.1:9")
    assert (
        run(policy, text, tmp_path / "out", *down, "--serve", f"{sys.executable} -c 'raise SystemExit(7)'")
        == 2
    )
    assert "ended with status 7 before it answered" in capfd.readouterr().err
    assert run(policy, text, tmp_path / "out", *down, "--serve", "no-such-program") == 2
    assert "no-such-program: No such file" in capfd.readouterr().err
    assert run(policy, text, tmp_path / "out", "--endpoint", fake.url, "--serve", "sleep 100") == 2
    assert "answers at" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--endpoint: none; --sampler endpoint needs the server's URL"),
        (("--endpoint", "http://x", "--sampler", "transformers"), "belong to --sampler endpoint"),
        (("--endpoint", "here:8000"), "--endpoint: here:8000; expected a URL"),
        (
            ("--endpoint", "http://x", "--requests_in_flight", "0"),
            "--requests_in_flight: 0; expected at least 1",
        ),
        (("--endpoint", "URL"), "is not the one of --model"),
        (("--endpoint", "URL", "--endpoint_model", "other"), "has no model other; it has policy"),
    ],
)
def test_bad_usage_is_one_message_and_status_2(
    policy: Path,
    text: Path,
    tmp_path: Path,
    fake: FakeServer,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    message: str,
) -> None:
    given = [fake.url if word == "URL" else word for word in options]
    assert run(policy, text, tmp_path / "out", *given) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
