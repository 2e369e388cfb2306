"""Scores of the reference's own completions: how rows have them, and the quantiles that reach the loss."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.relabel import relabel
from dpo.commands.inputs import with_reference
from dpo.config import Config, LossConfig
from dpo.data.dataset import TokenizedDataset
from dpo.data.fields import RowError
from dpo.data.mismatched import with_mismatched
from dpo.data.pairing import quantiles
from dpo.data.preference_data import preference_data
from dpo.data.records import NO_RIVAL, Pair
from dpo.data.rows import group_from_row
from dpo.errors import UserError
from dpo.loss.catalog import loss_problems
from dpo.reference.values import ReferenceUse
from dpo.tracking.metrics import MetricSums
from dpo.train.preference_objective import PreferenceObjective

SCORED = {"prompt": "the", "completions": [" cat", " mat", " day"], "scores": [1.0, 3.0, 2.0]}
POINT = {"prompt": "the", "completion": " cat", "score": 2.0, "reference_scores": [1.0, 2.0, 3.0, 4.0]}


@pytest.fixture
def opened(
    make_config: Callable[..., Config],
    write_jsonl: Callable[..., str],
    open_data: Callable[[Config], TokenizedDataset],
) -> Callable[..., TokenizedDataset]:
    """The data set of rows; keywords are options of `data`."""

    def open_rows(*rows: dict[str, Any], **options: Any) -> TokenizedDataset:
        config = make_config(write_jsonl([*rows]))
        return open_data(replace(config, data=replace(config.data, **options)))

    return open_rows


def test_a_quantile_is_the_share_that_scores_no_more() -> None:
    assert quantiles([0.0, 1.0, 1.5, 9.0], [1.0, 1.0, 2.0, 3.0]) == (0.0, 0.5, 0.5, 1.0)


def test_without_scores_of_the_reference_a_groups_own_are_taken(
    opened: Callable[..., TokenizedDataset],
) -> None:
    data = opened(SCORED, {**SCORED, "prompt": "a", "reference_scores": [0.0, 1.0, 2.5, 2.5]})
    assert data.quantiles.tolist() == pytest.approx([1 / 3, 1.0, 2 / 3, 0.5, 1.0, 0.5])
    assert data[1].quantiles == (0.5, 1.0, 0.5)
    assert data.counts["prompts_with_few_reference_scores"] == 2
    assert (
        "prompts_with_few_reference_scores" not in opened({**SCORED, "reference_scores": [*range(8)]}).counts
    )


def test_every_pair_alone_keeps_its_quantiles(opened: Callable[..., TokenizedDataset]) -> None:
    data = opened(SCORED, group_pairs=False)
    assert [data[index].quantiles for index in range(2)] == [(1.0, pytest.approx(1 / 3)), (1.0, 2 / 3)]


def test_a_completion_with_a_score_needs_no_label() -> None:
    assert group_from_row(POINT).pairs == (Pair(NO_RIVAL, 0),)  # at the median
    assert group_from_row({**POINT, "score": 2.5, "reference_scores": [1, 2, 2, 3]}).pairs == (
        Pair(0, NO_RIVAL),
    )
    assert group_from_row({**POINT, "label": True}).pairs == (Pair(0, NO_RIVAL),)
    alone = {name: value for name, value in POINT.items() if name != "reference_scores"}
    with pytest.raises(RowError, match="no field 'label'"):
        group_from_row(alone)
    assert group_from_row({**alone, "label": True}).scores is None  # it says nothing by itself
    with pytest.raises(RowError, match="reference_scores is"):
        group_from_row({**POINT, "reference_scores": [1.0, "x"]})


def test_labels_with_scores_stay_labels_where_the_reference_has_scores() -> None:
    """As data_prep writes a completion with its score."""
    row = {
        "prompt": "p",
        "completions": [" a"],
        "labels": [True],
        "scores": [2.0],
        "reference_scores": [1.0, 3.0],
    }
    group = group_from_row(row)
    assert group.pairs == (Pair(0, NO_RIVAL),)
    assert (group.scores, group.reference_scores) == ((2.0,), (1.0, 3.0))
    flipped = relabel(group_from_row({**SCORED, "reference_scores": [1.0, 3.0]}), "flipped", 0)
    assert flipped.reference_scores == (-1.0, -3.0)


def test_completions_without_a_score_have_no_quantile(
    opened: Callable[..., TokenizedDataset], preference_rows: Callable[..., list[dict[str, Any]]]
) -> None:
    data = opened(*preference_rows(2))
    assert np.isnan(data.quantiles).all()
    assert data[0].quantiles is None
    use = ReferenceUse(
        model=None,  # type: ignore[arg-type]  # not looked at
        options=None,  # type: ignore[arg-type]
        store=None,
        datasets=[data],
        sums=[],
        values=[np.zeros(len(data.keys))],
    )
    with pytest.raises(UserError, match=r"loss.type: qrpo; the data has pairs without scores"):
        with_reference(LossConfig(type="qrpo"), [data], use)


def test_a_completion_of_another_prompt_has_none(opened: Callable[..., TokenizedDataset]) -> None:
    data = with_mismatched(opened(SCORED, {**SCORED, "prompt": "a"}), "data.train")
    first = data.quantiles[:4]
    assert first[:3].tolist() == pytest.approx([1 / 3, 1.0, 2 / 3])
    assert np.isnan(first[3])


def test_the_loss_reads_them(opened: Callable[..., TokenizedDataset]) -> None:
    """At policy = reference: [(q_w - beta ln Z)^2 + (q_l - beta ln Z)^2] / 2 of each pair, or of one side."""
    data, beta = opened(SCORED, POINT), 0.5
    level = beta * np.log(beta * (np.exp(1 / beta) - 1))
    objective = PreferenceObjective(
        data=preference_data(data, np.zeros(len(data.keys)), with_quantiles=True),
        loss_config=LossConfig(type="qrpo", beta=beta),
        dtype="float32",
    )
    batch = objective.batch(np.array([0, 1]), "packed")
    assert batch.reference is not None
    found = objective.loss(batch.reference, batch, MetricSums()).item()
    pairs = [((1.0 - level) ** 2 + (low - level) ** 2) / 2 for low in (1 / 3, 2 / 3)]
    assert found == pytest.approx(sum(pairs) + (0.5 - level) ** 2)


def test_what_compares_pairs_with_others_does_not_mix_with_it() -> None:
    assert list(loss_problems(LossConfig(type=["qrpo", "sft"]))) == []
    (problem,) = loss_problems(LossConfig(type=["qrpo", "aot"]))
    assert problem.endswith("qrpo does not mix with losses that compare pairs with others")


def test_other_scores_of_the_reference_are_other_content(
    opened: Callable[..., TokenizedDataset], tmp_path: Path
) -> None:
    one, other = opened(POINT), opened({**POINT, "reference_scores": [2.5, 3.0]})
    assert one.content_digest() == other.content_digest()
    assert one.quantiles_digest() != other.quantiles_digest()
