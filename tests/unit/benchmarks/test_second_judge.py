"""The second judge's numbers from made-up samples, with a judge that counts an exclamation mark."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.second_judge import best_of, compared, sentences
from dpo.evaluate.asked import Asked


class Exclamations:
    name = "exclamations"
    identity: str | None = None

    def score(self, prompts: Sequence[Asked], completions: Sequence[str]) -> list[float]:
        return [float(text.count("!")) for text in completions]

    def is_positive(self, score: float) -> bool:
        return score > 0.5


def test_both_models_samples_are_judged() -> None:
    rows = [
        {"prompt": "a", "reference": "no", "policy": "yes!"},
        {"prompt": "b", "reference": "!", "policy": "!"},
    ]
    found = compared(Exclamations(), rows)
    assert found["score/policy"] == 1
    assert found["score/reference"] == 0.5
    assert found["positive_share/policy"] == 1
    assert found["positive_share/reference"] == 0.5
    assert found["win_rate"] == 0.75  # one won, one tie


def test_the_sample_that_the_first_judge_prefers_is_judged_by_the_second() -> None:
    rows = [
        {"prompt": "a", "reference": ["", "!", "!!!"], "reference_scores": [0.1, 0.9, 0.5]},
        {"prompt": "b", "reference": ["!", "", "!!"], "reference_scores": [0.3, 0.2, 0.8]},
    ]
    found = best_of(Exclamations(), rows)
    assert [found[n]["score/policy"] for n in ("1", "2", "4")] == [0.5, 1.0, 1.5]
    # Deviations from the means of each prompt.
    first, second = [-0.4, 0.4, 0, -4 / 30, -7 / 30, 11 / 30], [-4 / 3, -1 / 3, 5 / 3, 0, -1, 1]
    product = sum(a * b for a, b in zip(first, second, strict=True))
    norm = (sum(a * a for a in first) * sum(b * b for b in second)) ** 0.5
    assert found["agreement"]["correlation/within_prompts"] == pytest.approx(product / norm)


def test_sentences_are_divided_by_their_text_alone(tmp_path: Path) -> None:
    lines = [f'"sentence {number}, of a review",{number % 2},rotten_tomatoes' for number in range(200)]
    file = tmp_path / "reviews.csv"
    file.write_text("\n".join(["text,label,source", "long,1,imdb", *lines]) + "\n")
    train, held_out = sentences(file)
    assert len(train) + len(held_out) == 200
    assert 5 < len(held_out) < 40
    file.write_text("\n".join(["text,label,source", *reversed(lines)]) + "\n")
    assert {text for text, _ in sentences(file)[1]} == {text for text, _ in held_out}
