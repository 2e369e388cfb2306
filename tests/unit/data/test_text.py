"""Plain text: read from packed files and folders, tokenized into blocks once, refused where it is faulty."""

import gzip
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from dpo.config import DataConfig, DataSource
from dpo.data import text as text_module
from dpo.data.build import open_datasets
from dpo.data.dataset import TokenizedDataset
from dpo.data.text import check_text, is_text, open_text_or_preferences, read_lines
from dpo.errors import UserError

LINES = ["the cat sat on the mat", "a good day ended well", "we like films"]


Open = Callable[..., tuple[TokenizedDataset, TokenizedDataset | None]]


@pytest.fixture
def open_sft(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Open:
    def open_it(train: str | Path, **options: Any) -> tuple[TokenizedDataset, TokenizedDataset | None]:
        data = DataConfig(train=str(train), cache_dir=str(tmp_path / "cache"), **options)
        return open_text_or_preferences(data, tokenizer, 64)

    return open_it


def text_file(path: Path, lines: list[str] = LINES) -> Path:
    content = "".join(f"{line}\n" for line in lines).encode()
    packed = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
    path.write_bytes(packed(content))
    return path


def stream(data: TokenizedDataset) -> list[int]:
    """All ids of all blocks, one after the other."""
    return [int(i) for n in range(len(data)) for part in (data[n].prompt, *data[n].completions) for i in part]


def test_documents_follow_one_another_each_ended_by_eos(
    open_sft: Open, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    data, test = open_sft(text_file(tmp_path / "a.txt"), max_length=8)
    assert test is None
    eos = "<|endoftext|>"
    assert tokenizer.decode(stream(data)) == eos + "".join(line + eos for line in LINES)


def test_a_block_is_full_and_its_first_token_is_its_prompt(open_sft: Open, tmp_path: Path) -> None:
    data, _ = open_sft(text_file(tmp_path / "a.txt", LINES * 50), max_length=8)
    lengths = [len(data[n].completions[0]) for n in range(len(data))]
    assert all(len(data[n].prompt) == 1 and len(data[n].completions) == 1 for n in range(len(data)))
    assert lengths[:-1] == [7] * (len(data) - 1)
    assert 1 <= lengths[-1] <= 7
    assert data.pairs_per_group.sum() == 0


def test_many_lines_lose_no_token(open_sft: Open, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    lines = [f"{number} the cat" for number in range(9000)]  # several calls of the tokenizer
    data, _ = open_sft(text_file(tmp_path / "a.txt", lines), max_length=50)
    eos = "<|endoftext|>"
    found = tokenizer.decode(stream(data))
    # A last single token has no predictor and makes no block.
    assert (eos + "".join(line + eos for line in lines)).startswith(found)
    assert len(found) >= len("".join(lines))


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".txt.xz"])
def test_lines_are_read_from_plain_and_packed_files(tmp_path: Path, suffix: str) -> None:
    path = text_file(tmp_path / f"a{suffix}", ["  one ", "", "naïve ☕", "  "])
    assert list(read_lines(str(path), "data.train")) == ["one", "naïve ☕"]
    assert is_text(str(path))


def test_a_folder_of_text_is_read_in_name_order(tmp_path: Path) -> None:
    text_file(tmp_path / "b.txt.gz", ["second"])
    text_file(tmp_path / "a.txt", ["first"])
    (tmp_path / "notes.md").write_text("not text of ours")
    assert is_text(str(tmp_path))
    assert list(read_lines(str(tmp_path), "data.train")) == ["first", "second"]


def test_preference_data_is_no_text_even_with_text_beside_it(tmp_path: Path) -> None:
    assert not is_text("org/dataset")
    assert not is_text([DataSource(path="corpus.txt")])
    assert not is_text(str(tmp_path / "data.jsonl"))
    assert not is_text(str(tmp_path))
    text_file(tmp_path / "corpus.txt")
    assert is_text(str(tmp_path))
    (tmp_path / "train.parquet").write_bytes(b"")
    assert not is_text(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"caf\xe9\n"),
        ("a.txt.gz", b"no gzip"),
        ("a.txt.gz", gzip.compress(b"text\n" * 1000)[:-20]),
        ("a.txt.gz", gzip.compress(b"text\n" * 1000)[:15] + b"\xff" * 40),
        ("a.txt.xz", b"no xz"),
        ("a.txt.xz", lzma.compress(b"text\n" * 1000)[:-20]),
    ],
    ids=["latin-1", "no gzip", "gzip cut off", "gzip damaged", "no xz", "xz cut off"],
)
def test_a_file_that_is_no_text_is_refused_by_name(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"data\.train: {path}: "):
        list(read_lines(str(path), "data.train"))


def test_missing_and_empty_text_is_refused(open_sft: Open, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.train: .*none\.txt"):
        open_sft(tmp_path / "none.txt")
    with pytest.raises(UserError, match=r"data\.test: .*none\.txt"):
        open_sft(text_file(tmp_path / "a.txt"), test=str(tmp_path / "none.txt"))
    with pytest.raises(UserError, match=r"data\.train: .*empty\.txt"):
        open_sft(text_file(tmp_path / "empty.txt", ["", "  "]))


def test_the_blocks_are_made_once_for_one_text_and_length(open_sft: Open, tmp_path: Path) -> None:
    path = text_file(tmp_path / "a.txt")
    first, _ = open_sft(path, max_length=8)
    renamed = path.rename(tmp_path / "b.txt")
    stamp = (first.path / "counts.json").stat().st_mtime_ns
    again, _ = open_sft(renamed, max_length=8)
    assert again.path == first.path
    assert (again.path / "counts.json").stat().st_mtime_ns == stamp
    assert open_sft(renamed, max_length=9)[0].path != first.path
    assert open_sft(text_file(renamed, LINES[:2]), max_length=8)[0].path != first.path


def test_blocks_made_by_an_earlier_version_are_found_again(
    open_sft: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_module, "tokenizer_digest", lambda _: "tokenizer")
    path = text_file(tmp_path / "a.txt", ["the cat sat", "we like films"])
    assert open_sft(path, max_length=8)[0].path.name == "d4fdedc7b688d861"


def test_preferences_are_opened_with_all_of_their_options(
    open_sft: Open, write_jsonl: Callable[..., str], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = [{"prompt": "the", "completions": [" cat", " mat", " day"], "scores": [0.0, 1.0, 2.0]}]
    train = [DataSource(path=write_jsonl(rows), weight=2.0)]
    data = DataConfig(train=train, group_pairs=False, pairing="all", cache_dir=str(tmp_path / "cache"))
    found, test = open_text_or_preferences(data, tokenizer, 64)
    assert test is None
    assert len(found) == 2 * 3
    assert found.path == open_datasets(data, tokenizer, 64)[0].path


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_prompt_length", 4),
        ("too_long", "drop"),
        ("group_pairs", False),
        ("pairing", "all"),
        ("min_margin", 0.5),
        ("test", [DataSource(path="held_out.txt")]),
        ("test", "held_out.jsonl"),
    ],
)
def test_an_option_that_text_does_not_use_is_refused(
    open_sft: Open, tmp_path: Path, option: str, value: Any
) -> None:
    path = text_file(tmp_path / "a.txt")
    with pytest.raises(UserError, match=rf"data\.{option}: "):
        open_sft(path, **{option: value})
    with pytest.raises(UserError, match=rf"data\.{option}: "):
        check_text(DataConfig(train=str(path), **{option: value}))
