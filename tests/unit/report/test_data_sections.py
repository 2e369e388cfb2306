"""Sections on the data: which there are, what they say, and that every format shows them."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from groups import ids
from nasty import NASTY
from transformers import PreTrainedTokenizerFast

from dpo.data.dataset import TokenizedDataset, map_dataset, write_dataset
from dpo.data.records import NO_RIVAL, Pair, TokenizedGroup
from dpo.evaluate.ches import ChesScores, sample_pairs
from dpo.evaluate.described_data import HELD_OUT, TRAINING, describe
from dpo.report.content import PairRow, Section
from dpo.report.data_sections import NO_RIVALS, data_sections
from dpo.report.html import data_page
from dpo.report.markdown import section_markdown
from dpo.report.terminal_table import section_text
from dpo.report.write import write_data_report

TITLES = [
    "Rows",
    "Lengths in tokens",
    "Repetition and contradiction",
    "What the reference thinks of the labels",
    "Why does the chosen log-prob fall?",
]


@pytest.fixture
def data(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> TokenizedDataset:
    """The first two pairs contradict each other; the third is alone."""

    def text(words: str) -> np.ndarray:
        return ids(*tokenizer(words).input_ids)

    well, badly = text(" ended well"), text(" ended badly on the mat")
    groups = [
        TokenizedGroup(prompt=text("a day"), completions=(well, badly), pairs=(Pair(0, 1),)),
        TokenizedGroup(prompt=text("a day"), completions=(well, badly), pairs=(Pair(1, 0),)),
        TokenizedGroup(prompt=text("films"), completions=(well, badly), pairs=(Pair(0, 1),)),
    ]
    write_dataset(groups, tmp_path / "data", Counter({"dropped/too_long": 4, "truncated/prompts": 1}))
    return map_dataset(tmp_path / "data", "digest")


def rows_of(section: Section) -> dict[str, list[str]]:
    return {label: list(cells) for label, *cells in section.rows}


def test_everything_that_is_known_has_its_section(
    data: TokenizedDataset, tokenizer: PreTrainedTokenizerFast
) -> None:
    ches = ChesScores(
        pairs=np.array([0, 2]),
        scores=np.array([-7.0, -1.0]),
        per_token=np.array([-0.5, -0.25]),
        likeness=np.array([0.5, 0.75]),
    )
    logps = {TRAINING: np.array([-1.0, -2, -1, -2, np.nan, -2])}
    described = describe({TRAINING: data, HELD_OUT: data}, logps, ches)
    sections = data_sections(described, tokenizer)
    assert [section.title for section in sections] == TITLES
    rows, lengths, repetition, reference, fall = sections
    assert rows_of(rows)["dropped: too long"] == ["4", "4"]
    assert rows_of(rows)["pairs that share their prompt"] == ["2 (66.7%)"] * 2
    assert rows_of(lengths)["chosen is longer"][0].startswith("33.3% [")
    assert [figure.name for figure in lengths.figures] == ["completion_tokens", "prompt_tokens"]
    assert rows_of(repetition)["pairs that stand in both orders"] == ["2 (66.7%)"] * 2
    assert rows_of(repetition)["prompts that training has too"] == ["", "2 (100.0%)"]
    assert [(pair.prompt, pair.chosen) for pair in repetition.pairs] == [
        ("a day", " ended well"),
        ("a day", " ended badly on the mat"),
    ]
    assert rows_of(reference)["pairs in the reference cache"] == ["2 (66.7%)", "-"]
    assert rows_of(reference)["ranked right"][0].startswith("50.0% [")
    assert rows_of(fall)["length-normalised score"] == ["-0.4875", "-0.375", "-0.2625"]
    assert [pair.measure for pair in fall.pairs] == ["-0.25", "-0.5"]  # the highest first
    assert "the median likeness is 0.62" in fall.notes[1]


def test_what_is_not_known_has_no_section(data: TokenizedDataset, tokenizer: PreTrainedTokenizerFast) -> None:
    unknown = {TRAINING: np.full(6, np.nan)}
    sections = data_sections(describe({TRAINING: data}, unknown), tokenizer)
    assert [section.title for section in sections] == TITLES[:3]
    assert all(len(section.columns) == 2 for section in sections)


def test_a_preferred_length_is_said_and_where_there_is_none_that_too(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    said = []
    for name, longer in (("longer", 60), ("shorter", 4), ("neither", 32)):
        groups = [
            TokenizedGroup(prompt=ids(n), completions=(ids(1, 2), ids(3)), pairs=(Pair(*order),))
            for n, order in enumerate([(0, 1)] * longer + [(1, 0)] * (64 - longer))
        ]
        write_dataset(groups, tmp_path / name, Counter())
        described = describe({TRAINING: map_dataset(tmp_path / name, name)}, {})
        said.append(data_sections(described, tokenizer)[1].notes[0])
    assert said[0].startswith("The labels prefer the longer completion in 94% of the pairs")
    assert said[1].startswith("The labels prefer the shorter completion in 94% of the pairs")
    assert said[2].startswith("The labels do not prefer a length")


def nasty_section() -> Section:
    pairs = [
        PairRow(prompt=f"{n} {NASTY}", chosen=NASTY, rejected="word " * 90, measure="-1") for n in (1, 2)
    ]
    return Section(
        title="Title",
        notes=[f"a note {NASTY}", "word " * 60],
        columns=("", "training"),
        rows=[("label " * 30, "1"), (NASTY, "2")],
        measure="nats",
        pairs=pairs,
    )


def test_on_a_terminal_no_line_is_too_long_and_nothing_acts() -> None:
    text = section_text(nasty_section(), 80, pairs=1)
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text
    assert "nats -1" in text
    assert "1 <script>" in text
    assert "2 <script>" not in text  # one pair was asked for


def test_text_of_data_stays_text_in_markdown_and_html() -> None:
    for page in (
        section_markdown(nasty_section(), "##"),
        data_page([nasty_section()], title=NASTY, command=NASTY),
    ):
        assert "<script>" not in page
        assert "\x1b" not in page
        assert "&lt;script&gt;" in page


def test_the_folder_holds_the_pages_the_numbers_and_all_listed_pairs(
    data: TokenizedDataset, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    described = describe({TRAINING: data}, {})
    sections = [*data_sections(described, tokenizer), nasty_section()]
    summary = described.summary() | {"none": float("nan")}
    write_data_report(sections, summary, tmp_path / "out", title="data", command="dpo data", shown=1)
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")}
    assert found == {
        "data.html",
        "data.md",
        "summary.json",
        "pairs.jsonl",
        "figures/completion_tokens.png",
        "figures/prompt_tokens.png",
    }
    numbers = json.loads((tmp_path / "out/summary.json").read_text())
    assert (numbers["training/pairs"], numbers["training/pairs_contradicted"], numbers["none"]) == (
        3,
        2,
        None,
    )
    pairs = [json.loads(line) for line in (tmp_path / "out/pairs.jsonl").read_text().splitlines()]
    assert [pair["section"] for pair in pairs] == [TITLES[2]] * 2 + ["Title"] * 2
    page = (tmp_path / "out/data.md").read_text()
    assert "1 &lt;script&gt;" in page
    assert "2 &lt;script&gt;" not in page


def test_labels_have_their_rows_and_no_rivals(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    prompts = [ids(*tokenizer(words).input_ids) for words in ("a day", "films", "we")]
    end = ids(*tokenizer(" ended well").input_ids)
    groups = [
        TokenizedGroup(prompt=prompts[0], completions=(end,), pairs=(Pair(0, NO_RIVAL),)),
        TokenizedGroup(prompt=prompts[0], completions=(end,), pairs=(Pair(NO_RIVAL, 0),)),
        TokenizedGroup(prompt=prompts[1], completions=(end,), pairs=(Pair(NO_RIVAL, 0),)),
        TokenizedGroup(prompt=prompts[2], completions=(end,), pairs=(Pair(NO_RIVAL, 0),)),
    ]
    write_dataset(groups, tmp_path / "labels", Counter())
    data = map_dataset(tmp_path / "labels", "labels")
    rows, lengths, repetition = data_sections(describe({TRAINING: data}, {}), tokenizer)
    found = rows_of(rows)
    assert found["pairs and labels"] == ["4"]
    assert (found["labelled desirable"], found["labelled undesirable"]) == (["1"], ["3"])
    assert lengths.notes == [NO_RIVALS]
    assert rows_of(lengths)["chosen minus rejected, mean"] == [""]
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in repetition.pairs] == [
        ("a day", " ended well", ""),
        ("a day", "", " ended well"),
    ]
    one_sided = map_dataset(tmp_path / "labels", "labels")
    assert len(sample_pairs(one_sided, 8)) == 0
    write_dataset(groups[1:], tmp_path / "bad", Counter())
    bad = map_dataset(tmp_path / "bad", "bad")
    lengths = data_sections(describe({TRAINING: bad}, {}), tokenizer)[1]
    assert rows_of(lengths)["chosen: median, 95th %, longest"] == [""]
