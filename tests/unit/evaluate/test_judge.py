"""A judge of two answers: what it is asked, in both orders, and what follows from its verdicts."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_server import FakeServer, fails, serving

from dpo.config import EvaluateConfig
from dpo.data.records import Message
from dpo.errors import UserError
from dpo.evaluate.asked import Asked
from dpo.evaluate.judge import (
    RUBRIC,
    Judge,
    Judged,
    Verdict,
    judge_all,
    judged_summary,
    open_judge,
    read_rubric,
    verdict_of,
)

ASKED = [Asked(f"prompt {n}") for n in range(4)]
SHORT = "{conversation}|{answer_a}|{answer_b}"


def says(verdict: Callable[[str, str], str]) -> Callable[[Mapping[str, Any]], Any]:
    """A server's answer with what the function says of the first and the second answer."""

    def answer(body: Mapping[str, Any]) -> Any:
        _, first, second = body["messages"][0]["content"].split("|")
        return {"choices": [{"message": {"content": verdict(first, second)}}]}

    return answer


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with serving(FakeServer(answer=says(lambda *_: "[[A]]"), models=["m/judge"])) as made:
        yield made


def judge_at(fake: FakeServer, tmp_path: Path) -> Judge:
    (tmp_path / "rubric.txt").write_text(SHORT)
    options = EvaluateConfig(judge=f"m/judge@{fake.url}", judge_rubric=str(tmp_path / "rubric.txt"))
    judge = open_judge(options)
    assert judge is not None
    return judge


def test_each_prompt_is_judged_in_both_orders(fake: FakeServer, tmp_path: Path) -> None:
    fake.answer = says(lambda first, second: f"so [[{'A' if first > second else 'B'}]]")
    judged = judge_all(judge_at(fake, tmp_path), ASKED, ["a", "z", "same", "b"], ["b", "c", "same", "a"])
    assert judged == [Judged("A", "B"), Judged("B", "A"), Judged("C", "C"), Judged("B", "A")]
    assert [one.wins for one in judged] == [1.0, 0.0, 0.5, 0.0]
    assert len(fake.asked) == 6  # equal answers are a tie, without asking
    summary = judged_summary(judged)
    assert summary["judge/win_rate"] == 1.5 / 4
    assert summary["judge/win_rate/low"] < 1.5 / 4 < summary["judge/win_rate/high"]
    assert summary["judge/ties"] == 0.25
    assert summary["judge/orders_agree"] == 1.0
    assert summary["judge/first_wins"] == 0.5
    assert summary["judge/unclear"] == 0.0


def test_a_judge_that_always_takes_the_first_is_seen_and_gives_no_win_rate(
    fake: FakeServer, tmp_path: Path
) -> None:
    summary = judged_summary(judge_all(judge_at(fake, tmp_path), ASKED, [*"abcd"], [*"efgh"]))
    assert summary["judge/win_rate"] == 0.5
    assert summary["judge/first_wins"] == 1.0
    assert summary["judge/orders_agree"] == 0.0


def test_a_judge_that_says_neither_is_counted_and_alone_an_error(
    fake: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.answer = says(lambda first, _: "I like both" if first == "a" else "[[A]]")
    judged = judge_all(judge_at(fake, tmp_path), ASKED, [*"abcd"], [*"efgh"])
    assert judged[0] == Judged("A", "unclear")
    assert judged[0].wins is None
    summary = judged_summary(judged)
    assert summary["judge/unclear"] == 0.25
    assert summary["judge/first_wins"] == 1.0  # of three prompts
    assert "1 of 4 prompts have no clear verdict" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"none of 2 prompts got \[\[A\]\], .* in both orders"):
        judged_summary([Judged("unclear", "A"), Judged("B", "unclear")])


def test_the_interval_is_by_prompt_not_by_verdict() -> None:
    """Two orders of a prompt are one prompt: n prompts are no more certain than n coins."""
    judged = [Judged("A", "B"), Judged("B", "A")] * 50
    summary = judged_summary(judged)
    half = (summary["judge/win_rate/high"] - summary["judge/win_rate/low"]) / 2
    assert half == pytest.approx(1.96 * np.sqrt(0.25 / 100), rel=0.05)
    verdicts = judged_summary([Judged("A", "A"), Judged("B", "B")] * 50)
    half = (verdicts["judge/first_wins/high"] - verdicts["judge/first_wins/low"]) / 2
    assert half == pytest.approx(1.96 * np.sqrt(0.25 / 100), rel=0.05)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("[[A]]", "A"),
        ("B is wrong, at first [[B]] seems better, but [[A]]", "A"),
        ("C", "C"),
        (" **B**. ", "B"),
        ("A or B", "unclear"),
        ("A good question", "unclear"),
        ("[[D]]", "unclear"),
        ("", "unclear"),
    ],
)
def test_what_counts_as_a_verdict(text: str, verdict: Verdict) -> None:
    assert verdict_of(text) == verdict


def test_the_judge_sees_the_turns_and_no_text_is_taken_for_a_place(fake: FakeServer, tmp_path: Path) -> None:
    turns = (Message(role="user", content="hi"), Message(role="assistant", content="yes"))
    chat = Asked("hi\nyes\n{answer_a}", (*turns, Message(role="user", content="{answer_a}")))
    judge_at(fake, tmp_path).compare(chat, "{answer_b}", "two")
    content = fake.asked[0]["messages"][0]["content"]
    assert content == "user: hi\n\nassistant: yes\n\nuser: {answer_a}|{answer_b}|two"
    assert fake.asked[0]["temperature"] == 0
    assert fake.asked[0]["model"] == "m/judge"


def test_a_rubric_is_a_file_with_all_places(tmp_path: Path) -> None:
    assert read_rubric(None) == RUBRIC
    (tmp_path / "r.txt").write_text("{conversation} {answer_a}")
    with pytest.raises(UserError, match=r"r\.txt lacks \{answer_b\}; expected"):
        read_rubric(str(tmp_path / "r.txt"))
    with pytest.raises(UserError, match="expected a text file"):
        read_rubric(str(tmp_path / "none.txt"))


def test_a_judge_that_is_not_there_is_said_before_anything_is_sampled(fake: FakeServer) -> None:
    assert open_judge(EvaluateConfig()) is None
    assert open_judge(EvaluateConfig(judge=f"m/judge@{fake.url}", num_prompts=0)) is None
    with pytest.raises(UserError, match="has no model other; it has m/judge"):
        open_judge(EvaluateConfig(judge=f"other@{fake.url}"))


def test_a_judge_whose_tokens_all_went_into_reasoning_is_unclear(fake: FakeServer, tmp_path: Path) -> None:
    fake.answer = lambda _: {"choices": [{"message": {"content": None, "reasoning_content": "hm [[A]]"}}]}
    assert judge_at(fake, tmp_path).compare(ASKED[0], "a", "b") == "unclear"


@pytest.mark.parametrize("answer", [{"choices": [{"text": "x"}]}, {"choices": [{"message": {}}]}, {}])
def test_an_answer_without_a_message_is_tried_again(fake: FakeServer, tmp_path: Path, answer: Any) -> None:
    import json

    judge = judge_at(fake, tmp_path)
    fake.faults.append(fails(200, json.dumps(answer)))
    assert judge.compare(ASKED[0], "a", "b") == "A"
    assert len(fake.asked) == 2
