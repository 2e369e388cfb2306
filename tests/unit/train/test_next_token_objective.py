"""Next-token training: which completions are learned, and the loss per token."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from dpo.config import DataConfig, ModelConfig, SftTrainConfig
from dpo.data.dataset import TokenizedDataset
from dpo.data.text import open_text_or_preferences
from dpo.engine import world
from dpo.engine.engine import Engine
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
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


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
    labels = {"prompt": "the", "completions": [" cat", " mat", " day"], "labels": [False, True, True]}
    desirable = NextTokenObjective(dataset=open_sft(write_jsonl([labels], "labels.jsonl"))[0])
    ((_, completions),) = desirable.trees(np.array([0]))
    assert [tokenizer.decode(one) for one in completions] == [" mat<|endoftext|>", " day<|endoftext|>"]
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


def test_the_held_out_loss_is_nats_per_token_whatever_the_budget(
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
