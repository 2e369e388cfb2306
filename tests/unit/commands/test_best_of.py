"""dpo best-of on a tiny model: its files, and that its numbers are those of its samples."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from dpo.commands.best_of import best_of_reference
from dpo.config import Config, EvaluateConfig
from dpo.data.dataset import TokenizedDataset
from dpo.errors import UserError
from dpo.evaluate.asked import Asked
from dpo.evaluate.checks import check_best_of
from dpo.evaluate.scoring import VaderScorer


def test_all_missing_options_are_reported_at_once() -> None:
    with pytest.raises(UserError) as error:
        check_best_of(EvaluateConfig(num_prompts=0))
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == [
        "evaluate.scorer",
        "evaluate.num_prompts",
    ]


def test_the_reference_is_sampled_and_its_numbers_are_those_of_its_samples(
    make_config: Callable[..., Config],
    write_jsonl: Callable[..., str],
    preference_rows: Callable[..., list[dict[str, Any]]],
    open_data: Callable[[Config], TokenizedDataset],
    tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = make_config(write_jsonl(preference_rows(8)))
    options = EvaluateConfig(num_prompts=5, completion_tokens=6, scorer="vader", reference_samples=8)
    config = replace(config, evaluate=options)
    best_of_reference(config, config.model, open_data(config), tokenizer)
    folder = Path(config.run_dir, "best_of")
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    found = json.loads((folder / "best_of.json").read_text())
    assert [len(row["reference"]) for row in rows] == [8] * 5
    assert all(len(set(row["reference"])) > 4 for row in rows)  # every sample has its own random stream
    assert rows[0]["reference_scores"] == VaderScorer().score([Asked("")] * 2, rows[0]["reference"])
    scores = np.asarray([row["reference_scores"] for row in rows])
    one, two = found["best_of"]["1"], found["best_of"]["2"]
    assert one["score/policy"] == pytest.approx(scores.mean())
    assert one["kl/sequence"] == 0.0
    assert two["score/policy"] >= one["score/policy"]
    assert 1 < one["perplexity/policy_samples"] < 10_000
    assert found["limit"]["kl"][0] == 0.0
    assert "best_of.json" in capsys.readouterr().out
