"""Next-token training: text to blocks, which completions are learned, and the loss a token."""

import gzip
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from dpo.config import DataConfig, ModelConfig, SftTrainConfig
from dpo.data.dataset import TokenizedDataset
from dpo.data.text import is_text, open_text_or_preferences, read_lines
from dpo.engine import world
from dpo.engine.engine import Engine
from dpo.errors import UserError
from dpo.model.load import load_model
from dpo.tracking.metrics import MetricSums
from dpo.train.next_token_objective import NextTokenObjective, held_out_loss

LINES = ["the cat sat on the mat", "a good day ended well", "we like films"]


@pytest.fixture
def open_sft(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Callable[..., tuple[TokenizedDataset, TokenizedDataset | None]]:
    def open_it(train: str | Path, **options: Any) -> tuple[TokenizedDataset, TokenizedDataset | None]:
        data = DataConfig(train=str(train), cache_dir=str(tmp_path / "cache"), **options)
        return open_text_or_preferences(data, tokenizer, 64)

    return open_it


Open = Callable[..., tuple[TokenizedDataset, TokenizedDataset | None]]


def text_file(path: Path, lines: list[str] = LINES) -> Path:
    content = "".join(f"{line}\n" for line in lines).encode()
    packed = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
    path.write_bytes(packed(content))
    return path


def stream(data: TokenizedDataset) -> list[int]:
    """All ids of all blocks, one after the other."""
    return [int(i) for n in range(len(data)) for part in (data[n].prompt, *data[n].completions) for i in part]


def test_documents_stand_one_after_the_other_each_ended_by_eos(
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


def test_preference_data_are_no_text_even_with_text_beside_them(tmp_path: Path) -> None:
    assert not is_text("org/dataset")
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
    with pytest.raises(UserError, match=rf"data\.train: {path}: not readable as text"):
        list(read_lines(str(path), "data.train"))


def test_missing_and_empty_text_is_refused(open_sft: Open, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.train: .*none\.txt does not exist"):
        open_sft(tmp_path / "none.txt")
    with pytest.raises(UserError, match=r"data\.test: .*none\.txt does not exist"):
        open_sft(text_file(tmp_path / "a.txt"), test=str(tmp_path / "none.txt"))
    with pytest.raises(UserError, match=r"data\.train: .*empty\.txt has no text"):
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


def test_of_preferences_each_chosen_completion_is_learned_once(
    open_sft: Open, write_jsonl: Callable[..., str], tokenizer: PreTrainedTokenizerFast
) -> None:
    row = {
        "prompt": "the",
        "completions": [" cat", " mat", " day"],
        "pairs": [[0, 1], [0, 2], [1, 2]],
    }
    data, _ = open_sft(write_jsonl([row, {"prompt": "a", "chosen": " good day", "rejected": " bad"}]))
    objective = NextTokenObjective(dataset=data)
    both = np.array([0, 1])
    sequences = [(prompt, own) for prompt, completions in objective.trees(both) for own in completions]
    said = [tokenizer.decode([*prompt, *completion]) for prompt, completion in sequences]
    assert said == ["the cat<|endoftext|>", "the mat<|endoftext|>", "a good day<|endoftext|>"]
    assert objective.num_units(both) == 3
    lengths = [len(completion) for _, completion in sequences]
    assert objective.count(both) == sum(lengths)
    batch = objective.batch(both, "packed")
    assert batch.num_tokens.tolist() == lengths


def test_the_loss_is_a_sum_over_tokens_and_its_metric_a_mean(open_sft: Open, tmp_path: Path) -> None:
    data, _ = open_sft(text_file(tmp_path / "a.txt"), max_length=8)
    objective, sums = NextTokenObjective(dataset=data), MetricSums()
    for groups, logps in ((np.array([0]), [-14.0]), (np.array([0, 0]), [-7.0, -21.0])):
        batch = objective.batch(groups, "packed")
        loss = objective.loss(torch.tensor(logps), batch, sums)
        assert float(loss) == -sum(logps)
    assert sums.means() == {"loss": 2.0}  # 42 nats over three blocks of 7 predicted tokens


def test_the_held_out_loss_is_nats_a_token_whatever_the_budget(
    open_sft: Open, tmp_path: Path, tiny_model: Path
) -> None:
    data, _ = open_sft(text_file(tmp_path / "a.txt", LINES * 3), max_length=11)
    model = ModelConfig(name_or_path=str(tiny_model), dtype="float32")
    bare = load_model(model)
    total, count = 0.0, 0
    with torch.no_grad():
        for index in range(len(data)):
            ids = torch.tensor([[*data[index].prompt, *data[index].completions[0]]])
            logps = bare(input_ids=ids.long()).logits[0, :-1].double().log_softmax(-1)
            total -= float(logps.gather(1, ids[0, 1:, None].long()).sum())
            count += ids.shape[1] - 1
    engine = Engine(world.start(model), load_model(model), model, SftTrainConfig())
    for budget in (11, 10_000):
        place = {"layout": engine.layout, "device": engine.device}
        found = held_out_loss(engine.score_only, data, budget=budget, **place)
        assert found == {"eval/loss": pytest.approx(total / count, rel=1e-5)}
