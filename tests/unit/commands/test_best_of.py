"""dpo best-of: what it writes on a tiny model, and that its numbers are those of the samples beside them."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from dpo.commands.best_of import Drawn, best_of_reference, best_of_summary, check_baseline, numbers_of
from dpo.config import Config, EvaluateConfig
from dpo.data.dataset import TokenizedDataset
from dpo.errors import UserError
from dpo.evaluate.scoring import VaderScorer

TEXTS = [["bad bad day", "a good day", "a day", "great fun"], ["a day", "a day", "hate", "no"]]


def drawn() -> Drawn:
    scores = np.asarray([VaderScorer().score(texts) for texts in TEXTS])
    return Drawn(texts=TEXTS, scores=scores, tokens=np.asarray([[3, 3, 2, 2], [2, 2, 1, 1]]))


def test_the_best_of_two_by_hand() -> None:
    found = best_of_summary(drawn(), 2, [-3.0, -5.0], VaderScorer())
    first, second = np.sort(drawn().scores, axis=1)
    # Of the 6 pairs of 4 samples the largest is best in 3, the next in 2, the third in 1.
    assert found["score/policy"] == pytest.approx(
        np.mean([(3 * s[3] + 2 * s[2] + s[1]) / 6 for s in (first, second)])
    )
    assert found["positive_share/policy"] == pytest.approx((5 / 6 + 0) / 2)
    assert found["positive_share/reference"] == pytest.approx(2 / 8)
    assert found["perplexity/policy_samples"] == pytest.approx(math.exp(8 / 5))  # picks of 3 and 2 tokens
    assert found["distinct_2/policy"] == 1.0  # "a good", "good day"; "a day"
    # "a good day" loses to "great fun", "a day" wins over "no".
    assert found["win_rate"] == 0.5
    assert found["kl/bound"] == pytest.approx(math.log(2) - 0.5)
    assert 0 < found["kl/sequence"] < found["kl/bound"]


def test_as_many_are_compared_as_the_samples_tell_apart() -> None:
    assert numbers_of(8) == [1, 2]
    assert numbers_of(64) == [1, 2, 4, 8, 16]


def test_what_is_missing_is_said_at_once() -> None:
    with pytest.raises(UserError) as error:
        check_baseline(EvaluateConfig(num_prompts=0))
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
    assert all(len(set(row["reference"])) > 4 for row in rows)  # streams of their own
    assert rows[0]["reference_scores"] == VaderScorer().score(rows[0]["reference"])
    scores = np.asarray([row["reference_scores"] for row in rows])
    one, two = found["best_of"]["1"], found["best_of"]["2"]
    assert one["score/policy"] == pytest.approx(scores.mean())
    assert one["kl/sequence"] == 0.0
    assert two["score/policy"] >= one["score/policy"]
    assert 1 < one["perplexity/policy_samples"] < 10_000
    assert found["limit"]["kl"][0] == 0.0
    assert "best_of.json" in capsys.readouterr().out
