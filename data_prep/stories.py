"""The demo's data: generated stories, to pretrain a tiny model and to train it on preferences.

Writes preference files (an opening, 4 distinct continuations, happier preferred to sadder) and in the same
folder corpus.txt and corpus_heldout.txt with one whole story per line. No held-out opening is in the corpus
or in the training groups.
"""

import argparse
import random
from collections.abc import Collection, Iterator

from data_prep.files import PreferenceWriter, describe_arguments
from data_prep.grammar import MOODS, Mood, continuation, opening
from dpo import terminal
from dpo.data.pairing import pairs_from_scores
from dpo.data.records import PreferenceGroup
from dpo.errors import UserError

SUMMARY = "Stories from a built-in grammar that end happy, neutral or sad; needs no input."

MOOD_WEIGHTS: dict[Mood, float] = {"happy": 0.45, "neutral": 0.2, "sad": 0.35}
MOOD_SCORES: dict[Mood, float] = {"happy": 1.0, "neutral": 0.0, "sad": -1.0}
CONTINUATIONS_PER_PROMPT = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this source."""
    for name, default, text in (
        ("--num_stories", 20_000, "lines of corpus.txt"),
        ("--num_prompts", 2048, "training groups"),
        ("--num_test_prompts", 256, "held-out groups, and lines of corpus_heldout.txt"),
    ):
        parser.add_argument(name, type=int, default=default, metavar="N", help=f"{text} (default: {default})")


def run(args: argparse.Namespace) -> None:
    """Writes preference files, corpus.txt and corpus_heldout.txt. Raises UserError."""
    for name in ("num_stories", "num_prompts", "num_test_prompts"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}: {getattr(args, name)}; expected at least 1")
    with PreferenceWriter(
        args.output,
        overwrite=args.overwrite,
        completions_are_complete=True,
        source=describe_arguments(args),
    ) as writer:
        # each part has its own generator, so that the size of one does not change the others
        test = list(groups(args.num_test_prompts, random.Random(f"test {args.seed}")))
        held_out = {str(group.prompt) for group in test}
        train = groups(args.num_prompts, random.Random(f"train {args.seed}"), held_out)
        for group in test:
            writer.write("test", group)
        writer.write_all(("train", group) for group in train)

        rng = random.Random(f"corpus {args.seed}")
        with (writer.folder / "corpus.txt").open("w", encoding="utf-8") as corpus:
            for _ in terminal.progress(range(args.num_stories), description="corpus", unit="stories"):
                corpus.write(f"{story(rng, held_out)}\n")
        with (writer.folder / "corpus_heldout.txt").open("w", encoding="utf-8") as corpus:
            corpus.writelines(f"{group.prompt}{group.completions[0]}\n" for group in test)


def story(rng: random.Random, held_out: Collection[str]) -> str:
    """One story: an opening that is not held out, with a continuation of a random mood."""
    while True:
        prompt, fixed = opening(rng)
        if prompt not in held_out:
            return f"{prompt} {continuation(_mood(rng), fixed, rng)}"


def groups(count: int, rng: random.Random, held_out: Collection[str] = ()) -> Iterator[PreferenceGroup]:
    """Yields `count` groups with distinct prompts, none of them held out, each with at least one pair."""
    taken = set(held_out)
    while count:
        prompt, fixed = opening(rng)
        if prompt in taken:
            continue
        endings: dict[str, Mood] = {}
        while len(endings) < CONTINUATIONS_PER_PROMPT:
            mood = _mood(rng)
            endings[f" {continuation(mood, fixed, rng)}"] = mood
        scores = tuple(MOOD_SCORES[mood] for mood in endings.values())
        if pairs := pairs_from_scores(scores, "best-vs-rest"):
            taken.add(prompt)
            count -= 1
            yield PreferenceGroup(prompt=prompt, completions=tuple(endings), pairs=pairs, scores=scores)


def _mood(rng: random.Random) -> Mood:
    return rng.choices(MOODS, [MOOD_WEIGHTS[mood] for mood in MOODS])[0]
