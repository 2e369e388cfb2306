import json
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_prep.cli import main
from data_prep.grammar import mood_of
from data_prep.stories import groups

SMALL = ["stories", "--num_stories", "3000", "--num_prompts", "60", "--num_test_prompts", "20"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stories") / "out"
    assert main([*SMALL, "--output", str(out)]) == 0
    return out


def test_the_folder_has_groups_and_corpora_of_the_requested_sizes(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["rows"] == {"train": 60, "test": 20}
    assert manifest["completions_are_complete"] is True
    assert len((folder / "corpus.txt").read_text().splitlines()) == 3000
    assert len((folder / "corpus_heldout.txt").read_text().splitlines()) == 20


def test_no_held_out_prompt_is_in_training_or_in_the_corpus(folder: Path) -> None:
    train, test = (
        set(pq.read_table(folder / f"{split}.parquet")["prompt"].to_pylist()) for split in ("train", "test")
    )
    assert (len(train), len(test)) == (60, 20)
    assert not train & test
    assert not any(line.startswith(tuple(test)) for line in (folder / "corpus.txt").read_text().splitlines())
    heldout = (folder / "corpus_heldout.txt").read_text().splitlines()
    assert all(line.startswith(tuple(test)) for line in heldout)


def test_scores_are_the_moods_and_the_best_is_paired_with_every_worse_one(folder: Path) -> None:
    for row in pq.read_table(folder / "train.parquet").to_pylist():
        assert len(set(row["completions"])) == 4
        moods = [mood_of(completion) for completion in row["completions"]]
        scores = [{"happy": 1.0, "neutral": 0.0, "sad": -1.0}[mood] for mood in moods if mood]
        assert row["scores"] == scores
        best = scores.index(max(scores))
        worse = [index for index, score in enumerate(scores) if score < max(scores)]
        assert row["pairs"] == [{"chosen": best, "rejected": index} for index in worse] != []
        assert all(completion.startswith(" ") for completion in row["completions"])


def test_the_corpus_has_the_moods_in_their_shares(folder: Path) -> None:
    lines = (folder / "corpus.txt").read_text().splitlines()
    moods = [mood_of(line.split(". ", 2)[2]) for line in lines]
    # of 3000: 1350, 600 and 1050 expected, standard deviations 27, 22 and 26
    assert abs(moods.count("happy") - 1350) < 110
    assert abs(moods.count("neutral") - 600) < 90
    assert abs(moods.count("sad") - 1050) < 105


def test_the_same_seed_writes_the_same_files_and_another_seed_does_not(tmp_path: Path, folder: Path) -> None:
    for name, seed in (("same", "0"), ("other", "1")):
        assert main([*SMALL, "--seed", seed, "--output", str(tmp_path / name)]) == 0
    files = ("train.parquet", "test.parquet", "corpus.txt", "corpus_heldout.txt")
    assert all((folder / file).read_bytes() == (tmp_path / "same" / file).read_bytes() for file in files)
    assert all((folder / file).read_bytes() != (tmp_path / "other" / file).read_bytes() for file in files)


def test_held_out_openings_are_never_written() -> None:
    first = next(groups(1, random.Random(5)))
    again = next(groups(1, random.Random(5), {str(first.prompt)}))
    assert again.prompt != first.prompt


def test_a_size_below_one_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stories", "--num_prompts", "0", "--output", str(tmp_path / "out")]) == 2
    assert "--num_prompts: 0; expected at least 1" in capsys.readouterr().err
