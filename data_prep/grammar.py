"""The grammar of the demo's stories: neutral openings, and continuations that turn happy, neutral or sad.

An opening introduces a person, an object, a place and a companion; a continuation uses the same ones. One
table serves both directions: `opening` and `continuation` generate text, `mood_of` recognises it.
"""

import random
import re
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from dpo.files import read_lines

Mood = Literal["happy", "neutral", "sad"]
MOODS: tuple[Mood, ...] = get_args(Mood)

WOMEN = (
    "Anna",
    "Rosa",
    "Lily",
    "Ella",
    "Nora",
    "Ruth",
    "Clara",
    "Emma",
    "Alice",
    "Sara",
    "Ida",
    "Vera",
)
MEN = (
    "Tom",
    "Ben",
    "Max",
    "Sam",
    "Leo",
    "Jack",
    "Paul",
    "Finn",
    "Oscar",
    "David",
    "Hugo",
    "Karl",
)

SLOTS: dict[str, tuple[str, ...]] = {
    # person, object, place and companion: chosen by the opening, repeated by its continuations
    "Name": (*WOMEN, *MEN),
    "They": ("She", "He"),
    "they": ("she", "he"),
    "them": ("her", "him"),
    "their": ("her", "his"),
    "object": (
        "kite", "boat", "drum", "bicycle", "lamp", "clock", "basket", "puppet", "camera", "wagon", "guitar",
        "ladder", "scarf", "lantern", "map", "radio", "chair", "piano", "tent", "violin",
    ),
    "place": (
        "market", "harbour", "library", "station", "river", "school", "lake", "museum", "bridge", "mill",
        "square", "farm",
    ),
    "companion": (
        "baker", "teacher", "farmer", "postman", "neighbour", "gardener", "painter", "driver", "sailor",
        "tailor",
    ),
    # openings
    "when": (
        "before noon", "after lunch", "on Monday", "on Friday", "in the evening", "early in the morning",
        "after school", "before supper", "on market day", "at the end of March",
        "in the first week of autumn",
    ),
    "weather": (
        "the wind was cold", "rain fell on the fields", "snow lay on the roofs", "the sky was white",
        "clouds moved over the hills", "the street was wet", "the air was dry", "fog hung over the fields",
        "leaves blew across the road", "the sun stood over the roofs",
    ),
    "waited": (
        "stood by the door", "waited at the corner", "sat on a bench", "walked past with a dog",
        "read a newspaper", "looked through the window", "pushed a cart", "talked on the phone",
    ),
    # happy
    "rejoiced": (
        "smiled", "laughed", "cheered", "was happy", "was delighted", "felt proud", "felt wonderful",
        "was thrilled",
    ),
    "succeeded": (
        "worked perfectly", "looked beautiful", "won a prize", "was a great success", "was a perfect gift",
        "was better than ever", "shone like a treasure", "pleased everyone",
    ),
    "praised": ("praised", "loved", "admired", "enjoyed"),
    "celebrated": (
        "smiled with joy", "laughed with delight", "jumped for joy", "danced with pleasure",
        "hugged everyone", "sang a cheerful song", "thanked everyone with a smile",
    ),
    "best": ("best", "happiest", "most charming", "most wonderful", "most beautiful", "most delightful"),
    "lovely": ("lovely", "beautiful", "sweet", "wonderful", "delightful", "charming", "perfect", "pretty"),
    "glad": ("happy", "glad", "cheerful", "joyful", "warm", "grateful"),
    # sad
    "grieved": (
        "cried", "wept", "was sad", "was upset", "felt miserable", "felt terrible", "was heartbroken",
        "felt awful",
    ),
    "failed": (
        "was badly broken", "was ruined", "was stolen", "had a terrible crack", "was destroyed", "was lost",
        "looked ugly", "was a sad failure",
    ),
    "damaged": ("damaged", "hated", "mocked", "ruined"),
    "mourned": (
        "cried with grief", "wept in pain", "felt very lonely", "was sad and angry", "shouted in anger",
        "trembled with fear", "left in tears",
    ),
    "worst": ("worst", "saddest", "most awful", "most painful", "most terrible", "most miserable"),
    "cruel": ("cruel", "bitter", "nasty", "hostile", "terrible", "rude", "horrible", "dreadful"),
    "sorry": ("sad", "bitter", "gloomy", "miserable", "troubled", "lonely"),
    "fight": ("fight", "quarrel", "argument", "talk", "evening"),
    # neutral
    "put": ("put", "left", "set", "placed"),
    "somewhere": (
        "on a table", "by the wall", "under a tree", "in a box", "beside the steps", "in the grass",
        "on the ground", "next to a window",
    ),
    "acted": (
        "looked at the sky", "counted the windows", "sat on the steps", "waited for the bus",
        "drank some water", "read a sign", "walked around the {place}", "turned towards the {place}",
    ),
    "told": (
        "named the price", "told how it was made", "pointed at the label", "spoke about its colour",
        "showed both sides of it", "said where it came from",
    ),
    "hour": (
        "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    ),
    "closed": ("closed the door", "went inside", "crossed the road", "opened a book", "made some tea"),
    # any mood
    "went": ("walked home", "ran home", "went home", "rode home", "went back"),
    "along": (
        "along the river", "by the main road", "past the old wall", "over the hill", "through the fields",
        "across the square",
    ),
    "said": ("said", "whispered", "called", "replied"),
    "time": ("day", "afternoon", "hour", "moment", "morning"),
    "span": ("life", "year", "week", "summer"),
    "thing": ("cake", "flower", "ribbon", "book", "card", "bell", "shell", "picture"),
    "look": ("look", "answer", "letter", "word", "push", "reply"),
    "face": ("face", "voice", "song", "step"),
    "meal": ("supper", "dinner", "lunch", "breakfast", "bowl of soup", "pot of tea"),
}  # fmt: skip
"""Slot -> its possible values. A value may contain slots."""

OPENINGS = (
    (
        "{Name} took the {object} to the {place} {when}.",
        "{Name} sat near the {place} with the {object} {when}.",
        "{Name} carried the {object} past the {place} {when}.",
        "{Name} was at the {place} with the {object} {when}.",
    ),
    (
        "The {companion} {waited}, and {weather}.",
        "The {companion} {waited} while {weather}.",
        "Nearby the {companion} {waited}, and {weather}.",
    ),
)
"""The first and the second sentence of every opening."""

CONTINUATIONS: dict[Mood, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "happy": (
        (
            "{They} {rejoiced} because the {object} {succeeded}.",
            "{Name} saw that the {object} {succeeded}, and {they} {celebrated}.",
            "The {companion} {praised} the {object}, and {Name} {celebrated}.",
            "The {object} {succeeded}, so {Name} {celebrated}.",
        ),
        (
            "It was the {best} {time} of {their} {span}.",
            "The {companion} {rejoiced} and gave {them} a {lovely} {thing}.",
            "Then {they} {went} {along} with a {glad} {face}.",
            "Later {they} and the {companion} had a {lovely} {meal}.",
        ),
    ),
    "sad": (
        (
            "{They} {grieved} because the {object} {failed}.",
            "{Name} saw that the {object} {failed}, and {they} {mourned}.",
            "The {companion} {damaged} the {object}, and {Name} {mourned}.",
            "The {object} {failed}, so {Name} {mourned}.",
        ),
        (
            "It was the {worst} {time} of {their} {span}.",
            "The {companion} {grieved} and gave {them} a {cruel} {look}.",
            "Then {they} {went} {along} with a {sorry} {face}.",
            "Later {they} and the {companion} had a {cruel} {fight}.",
        ),
    ),
    "neutral": (
        (
            "{They} {put} the {object} {somewhere} and {acted}.",
            "{Name} {put} the {object} {somewhere}, and {they} {acted}.",
            "The {companion} asked about the {object}, and {Name} {told}.",
        ),
        (
            "At {hour} the {companion} {closed}, and {they} {went}.",
            "Then {they} {went} {along} with the {companion}.",
            "Later {they} and the {companion} had some {meal}.",
        ),
    ),
}
"""For each mood, the first and the second sentence of a continuation."""

_SLOT = re.compile(r"\{(\w+)\}")


def opening(rng: random.Random) -> tuple[str, dict[str, str]]:
    """A neutral opening of two sentences, and the values that its continuations must use.

    Returns:
        The text, and the value of each of Name, They, they, them, their, object, place and companion.
    """
    name = rng.choice(SLOTS["Name"])
    person = int(name in MEN)
    fixed = {slot: SLOTS[slot][person] for slot in ("They", "they", "them", "their")}
    fixed |= {slot: rng.choice(SLOTS[slot]) for slot in ("object", "place", "companion")}
    fixed["Name"] = name
    return _write(OPENINGS, fixed, rng), fixed


def continuation(mood: Mood, fixed: Mapping[str, str], rng: random.Random) -> str:
    """Two sentences of a mood about the person, object, place and companion of an opening."""
    return _write(CONTINUATIONS[mood], fixed, rng)


def mood_of(text: str) -> Mood | None:
    """The mood of a continuation of the grammar, None for any other text; surrounding space is ignored."""
    words = text.strip()
    return next((mood for mood in MOODS if _PATTERNS[mood].fullmatch(words)), None)


def _write(sentences: tuple[tuple[str, ...], ...], fixed: Mapping[str, str], rng: random.Random) -> str:
    def fill(template: str) -> str:
        return _SLOT.sub(lambda slot: fixed.get(slot[1]) or fill(rng.choice(SLOTS[slot[1]])), template)

    return " ".join(fill(rng.choice(templates)) for templates in sentences)


def _pattern(template: str) -> str:
    """A regular expression for every sentence that a template can give."""
    literals = _SLOT.split(template)  # text, slot, text, slot, ..., text
    return "".join(
        f"(?:{'|'.join(map(_pattern, SLOTS[piece]))})" if number % 2 else re.escape(piece)
        for number, piece in enumerate(literals)
    )


_PATTERNS = {
    mood: re.compile(" ".join(f"(?:{'|'.join(map(_pattern, templates))})" for templates in sentences))
    for mood, sentences in CONTINUATIONS.items()
}


def main(path: str) -> None:
    """Prints the share of each mood among the samples of a report's samples.jsonl."""
    rows = read_lines(Path(path))
    for model in ("reference", "policy"):
        moods = Counter(mood_of(row[model]) or "not of the grammar" for row in rows)
        shares = ", ".join(f"{count / len(rows):.1%} {mood}" for mood, count in moods.most_common())
        print(f"{model}: {shares}")


if __name__ == "__main__":
    main(sys.argv[1])
