"""An OpenAI-compatible server (vLLM, SGLang, llama.cpp): JSON over HTTP, with retries and a limit in flight.

What passes with time is tried again: a server that is overloaded (429), restarts, breaks the connection or
answers nonsense. What does not is one UserError: a request that is refused, or no answer after all tries.
Redirects are not followed.
"""

import json
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, TypeVar
from urllib.error import HTTPError, URLError
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
)

from dpo.errors import UserError
from dpo.pools import in_order

T = TypeVar("T")
R = TypeVar("R")

PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
"""HTTP statuses that may be another one a moment later."""
LONGEST_WAIT = 60.0
FIRST_TRIES = 3
"""Of the first request: a server that is not there yet should be said soon."""
KEY = "OPENAI_API_KEY"
"""Environment variable with the key of servers that ask for one."""


class BadAnswerError(ValueError):
    """An answer that is not what was asked for; the message says what was expected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """Where requests go, and how long they are tried."""

    url: str
    """Up to and with /v1, without a slash at the end."""
    option: str
    """The option that names the server, for messages."""
    in_flight: int = 32
    """Requests that are sent before the first of them is answered."""
    timeout: float = 600.0
    """Seconds without a byte after which a request is given up."""
    tries: int = 7
    first_wait: float = 1.0
    """Seconds before the second try; doubled before each further one."""

    def get(self, path: str, read: Callable[[Any], R]) -> R:
        """As `post`, without a body."""
        return self._ask(Request(f"{self.url}/{path}", headers=_headers()), read)

    def post(self, path: str, body: Mapping[str, Any], read: Callable[[Any], R]) -> R:
        """Sends a request until it is answered.

        Args:
            path: Behind /v1/, such as completions.
            body: As JSON.
            read: Takes what is needed from the answer; raises `BadAnswerError` for what is no such answer.

        Raises:
            UserError: It is refused, or there is no such answer after all tries.
        """
        return self._ask(Request(f"{self.url}/{path}", json.dumps(body).encode(), _headers()), read)

    def map(self, work: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
        """`work` of each item in their order, `in_flight` at a time; the first error ends it."""
        pool = ThreadPoolExecutor(min(self.in_flight, max(1, len(items))))
        return in_order(pool, work, items, ahead=len(items), wait=False)

    def _ask(self, request: Request, read: Callable[[Any], R]) -> R:
        wait, reason = self.first_wait, ""
        for number in range(self.tries):
            if number:
                time.sleep(wait * random.uniform(0.75, 1.25))
                wait = min(2 * wait, LONGEST_WAIT)
            try:
                with _OPENER.open(request, timeout=self.timeout) as response:
                    return read(json.loads(response.read()))
            except HTTPError as error:
                reason = f"status {error.code}: {_said_by(error)}"
                if error.code not in PASSING:
                    raise UserError(f"{self.option}: {request.full_url} refuses: {reason}") from error
                with suppress(TypeError, ValueError):  # no such header, or a date
                    wait = min(max(wait, float(error.headers.get("Retry-After", ""))), LONGEST_WAIT)
            except URLError as error:
                reason = f"no connection ({error.reason})"
            except (OSError, HTTPException) as error:
                reason = f"no answer ({error or type(error).__name__})"
            except BadAnswerError as error:
                reason = str(error)
            except ValueError:
                reason = "an answer that is not JSON"
        raise UserError(
            f"{self.option}: {request.full_url}: {reason}, after {self.tries} tries; expected an "
            "OpenAI-compatible server: see whether it runs and what it prints"
        )


def server_at(url: str, option: str, **options: Any) -> Server:
    """The server at a URL, with or without /v1.

    Args:
        url: http or https.
        option: The option that holds it, for messages.
        options: Further fields of `Server`.

    Raises:
        UserError: Another kind of URL.
    """
    base = url.rstrip("/").removesuffix("/v1")
    if not base.startswith(("http://", "https://")):
        raise UserError(f"{option}: {url}; expected a URL such as http://127.0.0.1:8000")
    return Server(url=f"{base}/v1", option=option, **options)


def models_of(answer: Any) -> list[str]:
    """The names in an answer to `models`. Raises BadAnswerError."""
    with suppress(KeyError, TypeError):
        return [str(model["id"]) for model in answer["data"]]
    raise BadAnswerError("an answer without a list of models")


def first_choice(answer: Any) -> dict[str, Any]:
    """The first choice of an answer to `completions` or `chat/completions`. Raises BadAnswerError."""
    with suppress(KeyError, IndexError, TypeError):
        return dict(answer["choices"][0])
    raise BadAnswerError(f"an answer without choices: {json.dumps(answer)[:200]}")


def _headers() -> dict[str, str]:
    key = os.environ.get(KEY)
    return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})


def _said_by(error: HTTPError) -> str:
    """The message of a refusal, in a line; servers wrap it in different ways."""
    text = ""
    with suppress(OSError, HTTPException):
        text = error.read(10_000).decode(errors="replace")
    with suppress(ValueError, KeyError, TypeError):
        said = json.loads(text)
        said = said.get("error", said)
        text = str(said["message"] if "message" in said else said["detail"])
    return " ".join(text.split())[:300] or str(error.reason)


def _opener() -> OpenerDirector:
    opener = OpenerDirector()
    for kind in (ProxyHandler, HTTPHandler, HTTPSHandler, HTTPErrorProcessor, HTTPDefaultErrorHandler):
        opener.add_handler(kind())
    return opener


_OPENER = _opener()
