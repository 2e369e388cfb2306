"""The whole grammar against VADER: every sentence it can write, with one name, thing, place and companion.

These four are checked to be no words of VADER's lexicon nor modifiers, so that another choice changes no
score.
"""

import itertools
import random
import re
from collections.abc import Iterator

import pytest
from vaderSentiment.vaderSentiment import BOOSTER_DICT, NEGATE, SentimentIntensityAnalyzer

from data_prep.grammar import CONTINUATIONS, MOODS, OPENINGS, SLOTS, Mood, continuation, mood_of, opening

ANALYZER = SentimentIntensityAnalyzer()
FIXED = {"Name": "Anna", "They": "She", "they": "she", "them": "her", "their": "her"}
FIXED |= {slot: SLOTS[slot][0] for slot in ("object", "place", "companion")}


def _compound(text: str) -> float:
    return float(ANALYZER.polarity_scores(text)["compound"])


def _all(template: str) -> Iterator[str]:
    """Everything that a template may become."""
    pieces = re.split(r"\{(\w+)\}", template)
    options = [
        [piece] if number % 2 == 0 else [FIXED[piece]] if piece in FIXED else list(_values(piece))
        for number, piece in enumerate(pieces)
    ]
    return map("".join, itertools.product(*options))


def _values(slot: str) -> Iterator[str]:
    return itertools.chain.from_iterable(map(_all, SLOTS[slot]))


@pytest.mark.parametrize("slot", ["Name", "object", "place", "companion"])
def test_who_what_and_where_carry_no_sentiment(slot: str) -> None:
    for word in map(str.lower, SLOTS[slot]):
        assert word not in ANALYZER.lexicon
        assert word not in BOOSTER_DICT
        assert word not in NEGATE


def test_every_sentence_of_an_opening_has_compound_zero() -> None:
    sentences = [sentence for templates in OPENINGS for template in templates for sentence in _all(template)]
    assert len(sentences) == 4 * 11 + 3 * 8 * 10
    assert {_compound(sentence) for sentence in sentences} == {0.0}


@pytest.mark.parametrize("mood", MOODS)
def test_every_sentence_of_a_continuation_has_the_sign_of_its_mood(mood: Mood) -> None:
    for template in itertools.chain.from_iterable(CONTINUATIONS[mood]):
        for sentence in _all(template):
            compound = _compound(sentence)
            assert {"happy": compound > 0.05, "neutral": compound == 0, "sad": compound < -0.05}[mood], (
                sentence
            )


def test_whole_stories_score_as_their_mood_and_are_recognised() -> None:
    rng = random.Random(0)
    for _ in range(500):
        prompt, fixed = opening(rng)
        assert _compound(prompt) == 0
        assert mood_of(prompt) is None
        for mood in MOODS:
            text = continuation(mood, fixed, rng)
            compound = _compound(f"{prompt} {text}")
            assert {"happy": compound > 0.05, "neutral": compound == 0, "sad": compound < -0.05}[mood], text
            assert mood_of(f" {text}\n") == mood
            assert 12 <= len(text.split()) <= 28


def test_one_opening_has_hundreds_of_thousands_of_happy_continuations() -> None:
    first, second = (
        len({sentence for template in templates for sentence in _all(template)})
        for templates in CONTINUATIONS["happy"]
    )
    assert first * second > 200_000


def test_a_continuation_uses_the_names_of_its_opening() -> None:
    rng = random.Random(1)
    for _ in range(200):
        _, fixed = opening(rng)
        text = continuation("happy", fixed, rng)
        assert fixed["object"] in text.split(".")[0]
        others = {word for word in SLOTS["Name"] if word != fixed["Name"]}
        assert not others & set(re.findall(r"\w+", text))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "She smiled because the kite worked perfectly.",  # one sentence
        "She smiled because the kite worked perfectly. It was the best day of her",  # cut short
        "She smiled because the kite worked perfectly. It was the worst day of her life.",  # two moods
        "She smiled because the moon worked perfectly. It was the best day of her life.",  # no such object
        "She smiled because the kite worked perfectly. It was the best day of her life. She smiled.",
    ],
)
def test_other_texts_have_no_mood(text: str) -> None:
    assert mood_of(text) is None


def test_the_vocabulary_is_small() -> None:
    rng = random.Random(0)
    words = set()
    for _ in range(2000):
        prompt, fixed = opening(rng)
        words |= set(
            re.findall(r"\w+", f"{prompt} {' '.join(continuation(mood, fixed, rng) for mood in MOODS)}")
        )
    assert 200 < len(words) < 500
