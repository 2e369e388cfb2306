"""An OpenAI-compatible server in this process that a test can break: answers come from a function."""

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = Callable[[BaseHTTPRequestHandler], None]
"""Answers a request in place of the server."""


@dataclass
class FakeServer:
    """What it serves, what goes wrong, and what it was asked."""

    answer: Callable[[Mapping[str, Any]], Any]
    """A request's body -> the answer, as JSON; a ValueError becomes status 500."""
    models: list[str] = field(default_factory=lambda: ["policy"])
    faults: list[Fault] = field(default_factory=list)
    """Each is used once, for a POST, in this order."""
    asked: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""


@contextmanager
def serving(server: FakeServer) -> Iterator[FakeServer]:
    """The server at a free port, while the block runs."""

    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            reply(self, 200, json.dumps({"data": [{"id": name} for name in server.models]}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                server.asked.append(body)
                fault = server.faults.pop(0) if server.faults else None
            if fault is not None:
                fault(self)
                return
            try:
                reply(self, 200, json.dumps(server.answer(body)))
            except ValueError as error:
                reply(self, 500, str(error))

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    server.url = f"http://127.0.0.1:{http.server_port}"
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def reply(handler: BaseHTTPRequestHandler, status: int, text: str, **headers: str) -> None:
    """Sends a response."""
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(text.encode())))
    handler.end_headers()
    handler.wfile.write(text.encode())


def fails(status: int, text: str = "", **headers: str) -> Fault:
    """A response that is not the answer."""
    return lambda handler: reply(handler, status, text, **headers)


def hangs_up(handler: BaseHTTPRequestHandler) -> None:
    """Ends the connection in the middle of an answer."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.wfile.flush()
    handler.close_connection = True
