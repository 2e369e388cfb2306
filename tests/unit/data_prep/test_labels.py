import json
import urllib.request
from email.message import Message
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.request import HTTPSHandler, Request
from urllib.response import addinfourl

import pyarrow.parquet as pq
import pytest

from data_prep import labels
from data_prep.cli import main
from data_prep.labels import Decoder, label_group
from dpo.data.fields import RowError
from dpo.data.notes import RowNotes
from dpo.data.records import Pair
from dpo.errors import UserError

GPT2 = Path(__file__).resolve().parents[3].parent / "shared" / "tokenizers" / "gpt2"
TEXT = {
    "query": "The day",
    "sample0": " was long.",
    "sample1": " was fun.",
    "sample2": " was short.",
    "sample3": " was hot.",
    "best": 1,
}
PADDING = 50259


def _letters(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def _ids(row: dict[str, Any]) -> dict[str, Any]:
    """The row as in the published files, with letters as tokens, padded to a length."""
    return {
        name: [*map(ord, value), *[PADDING] * (16 - len(value))] if isinstance(value, str) else value
        for name, value in row.items()
    }


@pytest.mark.parametrize("row", [TEXT, _ids(TEXT)])
def test_the_best_of_four_is_a_group_of_three_pairs(row: dict[str, Any]) -> None:
    notes = RowNotes()
    group = label_group(row, decode=_letters, notes=notes)
    assert group.prompt == "The day"
    assert group.completions == (" was long.", " was fun.", " was short.", " was hot.")
    assert group.pairs == (Pair(1, 0), Pair(1, 2), Pair(1, 3))
    assert not notes.drops


def test_a_sample_equal_to_the_best_makes_no_pair_and_is_counted() -> None:
    notes = RowNotes()
    group = label_group({**TEXT, "sample3": " was fun."}, decode=_letters, notes=notes)
    assert group.pairs == (Pair(1, 0), Pair(1, 2))
    assert notes.drops == {"pair_identical_to_best": 1}


def test_plain_pairs_of_the_hub_are_read_too() -> None:
    row = {"prompt": "p", "chosen": " a", "rejected": " b"}
    assert label_group(row, decode=_letters, notes=RowNotes()).pairs == (Pair(0, 1),)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"best": 4}, "bad_best"),
        ({"best": "1"}, "bad_best"),
        ({"sample2": None}, "bad_token_ids"),
        ({"sample2": [1.5]}, "bad_token_ids"),
        ({"sample2": [-1]}, "bad_token_ids"),
        ({"sample2": [PADDING, PADDING]}, "empty_completion"),
        ({f"sample{number}": " same" for number in range(4)}, "identical_completions"),
    ],
)
def test_a_faulty_row_is_refused_for_its_reason(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as error:
        label_group({**TEXT, **change}, decode=_letters, notes=RowNotes())
    assert error.value.reason == reason


@pytest.mark.skipif(not GPT2.is_dir(), reason="the shared GPT-2 tokenizer is not beside the repository")
def test_a_published_file_is_decoded_with_the_gpt2_tokenizer(tmp_path: Path) -> None:
    # in GPT-2's vocabulary 464 is "The", 1110 " day", 373 " was", 262 " the"
    row = {"query": [464, 1110], "sample0": [373, PADDING], "sample1": [262, PADDING], "best": 0}
    row |= {"sample2": [262, 262], "sample3": [373, 373]}
    (tmp_path / "offline_5k.json").write_text(json.dumps([row]))
    out = tmp_path / "out"
    command = ["labels", "--input", str(tmp_path / "offline_5k.json"), "--tokenizer", str(GPT2)]
    assert main([*command, "--test_fraction", "0", "--output", str(out)]) == 0
    (group,) = pq.read_table(out / "train.parquet").to_pylist()
    assert group["prompt"] == "The day"
    assert group["completions"] == [" was", " the", " the the", " was was"]
    assert json.loads((out / "manifest.json").read_text())["completions_are_complete"] is False


@pytest.mark.skipif(not GPT2.is_dir(), reason="the shared GPT-2 tokenizer is not beside the repository")
def test_an_id_beyond_the_vocabulary_is_a_faulty_row() -> None:
    with pytest.raises(RowError, match="50257"):
        Decoder(str(GPT2))([50257])


def test_a_missing_tokenizer_is_an_error_that_names_the_option(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--tokenizer: .*nowhere"):
        Decoder(str(tmp_path / "nowhere"))([1])


def test_a_download_is_recorded_with_size_and_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = tmp_path / "sentiment" / "offline_5k.json"
    published.parent.mkdir()
    published.write_text(json.dumps([TEXT]))
    monkeypatch.setattr(labels, "URL", f"{tmp_path.as_uri()}/{{file}}")
    monkeypatch.setattr(labels, "https_only", urllib.request.build_opener)
    assert main(["labels", "--test_fraction", "0", "--output", str(tmp_path / "out")]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    (source,) = manifest["sources"]
    assert (source["name"], source["bytes"]) == (published.as_uri(), published.stat().st_size)
    assert (len(source["sha256"]), manifest["pairs"]) == (64, 3)
    assert not (tmp_path / "out" / "offline_5k.json").exists()


def test_a_failed_download_names_the_option_to_use_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(labels, "URL", f"{tmp_path.as_uri()}/{{file}}")
    monkeypatch.setattr(labels, "https_only", urllib.request.build_opener)
    assert main(["labels", "--task", "tldr", "--output", str(tmp_path / "out")]) == 2
    assert "give the file as --input" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "address", ["http://localhost:9/{file}", "file:///etc/hostname?{file}", "ftp://h/{file}"]
)
def test_only_https_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], address: str
) -> None:
    monkeypatch.setattr(labels, "URL", address)
    assert main(["labels", "--output", str(tmp_path / "out")]) == 2
    assert f"unknown url type: {address.partition(':')[0]}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


class Redirecting(HTTPSHandler):
    """A server that redirects to plain http."""

    def https_open(self, request: Request) -> Any:
        head = Message()
        head["Location"] = "http://localhost:9/elsewhere"
        response = addinfourl(BytesIO(), head, request.full_url, 302)
        response.msg = "Found"
        return response


def test_a_redirect_away_from_https_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "HTTPSHandler", Redirecting)
    with pytest.raises(UserError, match="unknown url type: http"):
        labels.download("https://localhost/labels.json", tmp_path / "labels.json")


@pytest.mark.parametrize("content", ["{", "{}"])
def test_a_file_without_a_list_of_labels_is_an_error(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "labels.json").write_text(content)
    assert main(["labels", "--input", str(tmp_path / "labels.json"), "--output", str(tmp_path / "out")]) == 2
    assert "expected the published list of labels" in capsys.readouterr().err
