"""Prompts cut from text: exact lengths, paragraph starts, even spread, and splits that share nothing."""

import gzip
import json
import lzma
from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from data_prep.prompts import cut_prompts, read_documents, text_prompts
from dpo.errors import UserError


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """One token per byte: lengths can be counted by hand, and a cut can fall inside a letter."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({byte: number for number, byte in enumerate(bytes_)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def documents_of(path: Path, max_rows: int | None = None) -> list[list[str]]:
    return list(read_documents(str(path), max_rows=max_rows, num_prompts=1))


def cut(
    documents: Sequence[Sequence[str]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    train: int,
    test: int,
    seed: int = 0,
) -> tuple[list[str], list[str]]:
    prompts = text_prompts(
        documents, tokenizer, prompt_tokens=4, num_prompts=train, num_test_prompts=test, seed=seed
    )
    assert all(isinstance(prompt.content, str) for prompt in prompts)
    contents = [(prompt.split, str(prompt.content)) for prompt in prompts]
    return [text for split, text in contents if split == "train"], [
        text for split, text in contents if split == "test"
    ]


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_empty_lines_separate_documents_and_lines_are_paragraphs(tmp_path: Path, suffix: str) -> None:
    content = b"first\n  second \n\n\n third\n"
    packed = {"": content, ".gz": gzip.compress(content), ".xz": lzma.compress(content)}[suffix]
    file = tmp_path / f"text.txt{suffix}"
    file.write_bytes(packed)
    assert documents_of(file) == [["first", "second"], ["third"]]
    assert documents_of(file, max_rows=1) == [["first"]]


def test_a_folders_texts_are_read_in_name_order_and_each_ends_a_document(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "notes.md").write_text("not a text file")
    assert documents_of(tmp_path) == [["first"], ["second"]]


def test_a_row_with_text_is_a_document(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"text": "one\n\ntwo\n"}, {"text": " "}, {"text": "three"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert documents_of(file) == [["one", "two"], ["three"]]
    file.write_text('{"text": "one"}\n{"body": "two"}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl:2: no column `text`"):
        documents_of(file)
    file.write_text('{"text": "one"}\n{"text": "half \\ud83d"}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl:2: .*surrogate"):
        documents_of(file)


def test_what_cannot_be_read_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.txt"):
        documents_of(tmp_path / "nowhere.txt")
    with pytest.raises(UserError, match=r"input: .*\.txt"):
        documents_of(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"latin\.txt"):
        documents_of(tmp_path / "latin.txt")
    half = lzma.compress(b"text " * 1000)[:40]
    (tmp_path / "half.txt.xz").write_bytes(half)
    with pytest.raises(UserError, match=r"half\.txt\.xz"):
        documents_of(tmp_path / "half.txt.xz")


def test_prompts_start_paragraphs_and_have_the_exact_length(tokenizer: PreTrainedTokenizerBase) -> None:
    # "abc" is too short alone and is joined with "defg": abc, newline. "hijklm" is long enough; nothing
    # follows "no".
    assert cut_prompts(["abc", "defg", "hijklm", "no"], tokenizer, 4) == ["abc\n", "hijk"]


def test_a_cut_inside_a_letter_is_left_out(tokenizer: PreTrainedTokenizerBase) -> None:
    # The third letter of "naïve" has two bytes: 3 tokens would end between them, 4 after it.
    assert cut_prompts(["naïve"], tokenizer, 3) == []
    assert cut_prompts(["naïve"], tokenizer, 4) == ["naï"]


def test_prompts_are_spread_evenly_over_the_text(tokenizer: PreTrainedTokenizerBase) -> None:
    document = [f"{number:04d}" for number in range(12)]
    assert cut([document], tokenizer, train=3, test=0) == (["0000", "0004", "0008"], [])


def test_of_few_documents_the_end_of_the_text_is_held_out(tokenizer: PreTrainedTokenizerBase) -> None:
    # 12 pieces, and a third of the prompts is held out: the last 4 pieces.
    document = [f"{number:04d}" for number in range(12)]
    train, test = cut([document], tokenizer, train=4, test=2)
    assert train == ["0000", "0002", "0004", "0006"]
    assert test == ["0008", "0010"]


@pytest.mark.parametrize("seed", range(5))
def test_of_many_documents_whole_ones_are_held_out(tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
    documents = [[f"{letter}{number:03d}" for number in range(5)] for letter in "abcdefghijkl"]
    train, test = cut(documents, tokenizer, train=40, test=10, seed=seed)
    assert (len(set(train)), len(set(test))) == (40, 10)
    assert not {text[0] for text in train} & {text[0] for text in test}


def test_the_seed_chooses_the_documents(tokenizer: PreTrainedTokenizerBase) -> None:
    documents = [[f"{letter}{number:03d}" for number in range(5)] for letter in "abcdefghijkl"]
    held_out = {tuple(cut(documents, tokenizer, train=5, test=5, seed=seed)[1]) for seed in range(10)}
    assert len(held_out) > 3
    assert cut(documents, tokenizer, train=5, test=5) == cut(documents, tokenizer, train=5, test=5)


def test_a_text_that_two_documents_share_is_not_held_out(tokenizer: PreTrainedTokenizerBase) -> None:
    documents = [["same text", f"{letter}bcd", f"{letter}efg"] for letter in "abcdefghijkl"]
    train, test = cut(documents, tokenizer, train=5, test=2)
    assert not set(train) & set(test)


def test_too_little_text_is_an_error_that_says_how_much_there_is(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=r"1 train and 2 test prompts .* 5 and 2"):
        cut([["abcd", "efgh", "ijkl"]], tokenizer, train=5, test=2)
