"""Requests to an OpenAI-compatible server: what is tried again, what is one error, how many fly at once."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from fake_server import FakeServer, Fault, fails, hangs_up, serving

from dpo.errors import UserError
from dpo.evaluate.server import BadAnswerError, Server, first_choice, models_of, server_at

GOOD = {"choices": [{"text": "x"}]}


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with serving(FakeServer(answer=lambda _: GOOD)) as made:
        yield made


def at(fake: FakeServer, **options: Any) -> Server:
    return server_at(fake.url, "--endpoint", **{"first_wait": 0.01, "timeout": 5.0, **options})


def slow(handler: Any) -> None:
    time.sleep(1.0)
    fails(200, "{}")(handler)


@pytest.mark.parametrize(
    "fault",
    [
        fails(429, "too many"),
        fails(500, "oops"),
        fails(503, "loading"),
        fails(200, "<html>"),
        fails(200, '{"choices": []}'),
        fails(200, "[1]"),
        fails(200, "null"),
        hangs_up,
    ],
)
def test_what_passes_is_tried_again(fake: FakeServer, fault: Fault) -> None:
    fake.faults += [fault, fault]
    assert at(fake).post("completions", {}, first_choice) == {"text": "x"}
    assert len(fake.asked) == 3


def test_a_slow_answer_is_asked_for_again(fake: FakeServer) -> None:
    fake.faults += [slow]
    assert at(fake, timeout=0.2).post("completions", {}, first_choice) == {"text": "x"}


def test_the_server_says_how_long_to_wait(fake: FakeServer) -> None:
    fake.faults += [fails(429, "too many", Retry_After="0.5")]
    began = time.monotonic()
    at(fake).post("completions", {}, first_choice)
    assert 0.3 < time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (fails(429, "too many"), "status 429: too many, after 3 tries"),
        (fails(200, "<html>"), "an answer that is not JSON, after 3 tries"),
        (fails(200, "{}"), "an answer without choices"),
        (hangs_up, "after 3 tries"),
    ],
)
def test_after_all_tries_it_is_one_error(fake: FakeServer, fault: Fault, message: str) -> None:
    fake.faults += [fault] * 3
    with pytest.raises(UserError, match=message) as raised:
        at(fake, tries=3).post("completions", {}, first_choice)
    assert fake.url in str(raised.value)
    assert str(raised.value).startswith("--endpoint: ")


@pytest.mark.parametrize(
    ("status", "text", "said"),
    [
        (400, '{"error": {"message": "too long"}}', "too long"),
        (401, '{"detail": "no key"}', "no key"),
        (404, "not here", "not here"),
        (307, "", "status 307"),
    ],
)
def test_a_refusal_is_not_tried_again(fake: FakeServer, status: int, text: str, said: str) -> None:
    fake.faults += [fails(status, text, Location="http://127.0.0.1:1/")]
    with pytest.raises(UserError, match=said):
        at(fake).post("completions", {}, first_choice)
    assert len(fake.asked) == 1


def test_a_server_that_is_down_and_a_url_that_is_none() -> None:
    with pytest.raises(UserError, match=r"no connection \(.*refused.*\), after 2 tries"):
        server_at("http://127.0.0.1:9", "--endpoint", tries=2, first_wait=0.01).get("models", models_of)
    with pytest.raises(UserError, match=r"--endpoint: localhost:8000; expected a URL"):
        server_at("localhost:8000", "--endpoint")


def test_a_url_may_have_v1_or_not() -> None:
    urls = [server_at(f"http://h:1{end}", "--endpoint").url for end in ("", "/", "/v1", "/v1/")]
    assert set(urls) == {"http://h:1/v1"}


def test_as_many_requests_as_allowed_are_in_flight_and_answers_keep_their_order(fake: FakeServer) -> None:
    now, most, lock = [0], [0], threading.Lock()

    def work(n: int) -> int:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.01 * (n % 3))
        with lock:
            now[0] -= 1
        return n

    assert [*at(fake, in_flight=4).map(work, range(40))] == [*range(40)]
    assert 2 <= most[0] <= 4


def test_the_first_error_ends_the_rest(fake: FakeServer) -> None:
    started, lock = [0], threading.Lock()

    def work(n: int) -> int:
        with lock:
            started[0] += 1
        if n == 2:
            raise UserError("no")
        time.sleep(0.01)
        return n

    with pytest.raises(UserError, match="no"):
        [*at(fake, in_flight=2).map(work, range(500))]
    assert started[0] < 50


def test_the_key_of_the_environment_is_sent(fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    fake.faults += [lambda handler: (seen.append(handler.headers["Authorization"]), fails(400)(handler))[1]]
    with pytest.raises(UserError):
        at(fake).post("completions", {}, first_choice)
    assert seen == ["Bearer k"]


def test_models_of_something_else() -> None:
    with pytest.raises(BadAnswerError, match="list of models"):
        models_of({"data": [1]})
