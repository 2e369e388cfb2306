"""From measurements to a report: which rows, figures and worst cases it gets."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from nasty import history
from transformers import PreTrainedTokenizerFast

from dpo.data.dataset import TokenizedDataset, map_dataset, write_dataset
from dpo.data.records import Message, Pair, TokenizedGroup
from dpo.evaluate.asked import Asked
from dpo.evaluate.rewards import PairScores
from dpo.evaluate.samples import ComparedSamples
from dpo.report.build import (
    WORST,
    compose,
    for_judges,
    margin_figures,
    sample_rows,
    score_figures,
    training_figures,
    worst_pairs,
    worst_samples,
)
from dpo.report.content import Provenance, Section

SUMMARY = {"score/reference": 0.1, "score/policy": 0.4, "kl/sequence": 1.0}
SUMMARY |= {f"{name}/{end}": value for name, value in SUMMARY.items() for end in ("low", "high")}


def samples(reference: list[float] | None, policy: list[float] | None, number: int = 5) -> ComparedSamples:
    return ComparedSamples(
        seed=7,
        asked=[Asked(f"prompt {n}") for n in range(number)],
        scorer_identity=None,
        reference=[f"reference {n}" for n in range(number)],
        policy=[f"policy {n}" for n in range(number)],
        reference_scores=reference,
        policy_scores=policy,
        summary=SUMMARY,
    )


def test_samples_for_judges_have_messages_in_alpaca_evals_layout() -> None:
    chat = (Message(role="user", content="one"), Message(role="assistant", content="two"))
    asked = [
        Asked("p"),
        Asked("one", chat[:1]),
        Asked("one\ntwo", (*chat, Message(role="user", content="3"))),
    ]
    rows = for_judges(replace(samples(None, None, number=3), asked=asked))
    assert [row["generator"] for row in rows] == ["reference"] * 3 + ["policy"] * 3
    assert [row["output"] for row in rows[3:]] == ["policy 0", "policy 1", "policy 2"]
    assert [row["instruction"] for row in rows[:3]] == ["p", "one", "one\ntwo"]
    assert [len(row["messages"]) for row in rows[:3]] == [1, 1, 3]
    assert rows[0]["messages"] == [{"role": "user", "content": "p"}]


def scores(margins: list[float], reference: float = -1.0) -> PairScores:
    number, zeros = len(margins), np.zeros(len(margins))
    return PairScores(
        groups=np.array([0, 1, 1, 2, 3])[:number],
        losses=zeros,
        units=np.ones(number),
        chosen_rewards=np.array(margins),
        rejected_rewards=zeros,
        correct=(np.sign(margins) + 1) / 2,
        chosen_logps=zeros,
        rejected_logps=zeros,
        reference_logps=np.full((number, 2), reference),
        chosen_tokens=np.ones(number, np.int64),
        rejected_tokens=np.ones(number, np.int64),
    )


@pytest.fixture
def data(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> TokenizedDataset:
    """Four groups with 1, 2, 1 and 1 pairs; texts name the group and the completion."""

    def ids(text: str) -> np.ndarray:
        return np.array(tokenizer(text).input_ids, np.int32)

    groups = [
        TokenizedGroup(
            prompt=ids(f"group {number}"),
            completions=tuple(ids(f"completion {number}.{n}") for n in range(len(pairs) + 1)),
            pairs=tuple(pairs),
        )
        for number, pairs in enumerate([[Pair(0, 1)], [Pair(2, 0), Pair(2, 1)], [Pair(1, 0)], [Pair(0, 1)]])
    ]
    write_dataset(groups, tmp_path / "data", Counter())
    return map_dataset(tmp_path / "data", "digest")


def test_every_prompt_has_a_row_with_its_scores() -> None:
    rows = sample_rows(samples([0.0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0]))
    assert [row.index for row in rows] == [0, 1, 2, 3, 4]
    row = rows[3]
    assert (row.seed, row.prompt, row.reference, row.policy) == (7, "prompt 3", "reference 3", "policy 3")
    assert (row.reference_score, row.policy_score) == (0.0, 4.0)
    assert sample_rows(samples(None, None))[0].policy_score is None


def test_the_worst_samples_lose_by_the_most_and_ties_are_in_order() -> None:
    rows = sample_rows(samples([1.0] * 5, [0.5, 0.0, 1.0, 2.0, 0.5]))
    assert [row.index for row in worst_samples(rows)] == [1, 0, 4]
    assert worst_samples(sample_rows(samples(None, None))) == []
    many = samples([1.0] * 9, [0.0] * 9, number=9)
    assert len(worst_samples(sample_rows(many))) == WORST


def test_the_worst_pairs_are_named_by_their_texts(
    data: TokenizedDataset, tokenizer: PreTrainedTokenizerFast
) -> None:
    found = worst_pairs(scores([1.0, 2.0, -3.0, 0.0, -1.0]), data, tokenizer)
    assert [(row.prompt, row.chosen, row.rejected, row.measure) for row in found] == [
        ("group 1", "completion 1.2", "completion 1.1", "-3.00"),
        ("group 3", "completion 3.0", "completion 3.1", "-1.00"),
    ]


def test_figures_need_what_they_draw() -> None:
    assert training_figures([]) == []
    assert [figure.name for figure in training_figures(history(3))] == ["training", "rewards"]
    assert margin_figures(scores([1.0], reference=np.nan)) == []
    assert [figure.name for figure in margin_figures(scores([1.0]))] == ["margins"]
    assert score_figures(samples(None, None)) == []
    found = score_figures(samples([0.0] * 5, [1.0] * 5))
    assert [figure.name for figure in found] == ["scores", "score_kl"]


def test_a_report_has_the_metrics_of_pairs_and_samples(
    data: TokenizedDataset, tokenizer: PreTrainedTokenizerFast
) -> None:
    provenance = Provenance(essentials={}, commands=[])
    pairs = scores([1.0, 2.0, -3.0, 0.0, -1.0])

    def composed(compared: ComparedSamples | None) -> dict[str, float]:
        report = compose(
            pairs,
            compared,
            data=data,
            sections=[Section(title="Rows")],
            tokenizer=tokenizer,
            history=[],
            provenance=provenance,
            table_rows=2,
        )
        assert report.provenance is provenance
        assert [section.title for section in report.data] == ["Rows"]
        assert len(report.shown) == (2 if compared is not None else 0)
        assert len(report.worst_pairs) == 2
        return report.summary

    assert composed(None)["eval/rewards/accuracies"] == 0.5  # a tie counts half
    assert "kl/sequence" not in composed(None)
    assert composed(samples([0.0] * 5, [1.0] * 5))["kl/sequence"] == 1.0
