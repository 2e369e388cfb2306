"""Held-out metrics: values by hand, independence of batches and ranks, and a naive computation."""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dpo import distributed
from dpo.config import Config, LossConfig, ModelConfig
from dpo.data.dataset import TokenizedDataset, map_dataset, write_dataset
from dpo.data.mismatched import with_mismatched
from dpo.data.preference_data import preference_data
from dpo.data.records import NO_RIVAL, Pair, TokenizedGroup
from dpo.data.trees import TreeBatch, sequence_batch
from dpo.evaluate.rewards import PairScores, score_pairs
from dpo.model.load import load_model
from dpo.model.scorer import SequenceScorer

CPU = torch.device("cpu")


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


@pytest.fixture
def data(tmp_path: Path) -> TokenizedDataset:
    """Three groups of two, three and two completions of one token; the token identifies the completion."""
    groups = [
        TokenizedGroup(prompt=ids(90), completions=(ids(1), ids(2)), pairs=(Pair(0, 1),)),
        TokenizedGroup(
            prompt=ids(90, 91, 92), completions=(ids(3), ids(4), ids(5)), pairs=(Pair(2, 0), Pair(2, 1))
        ),
        TokenizedGroup(prompt=ids(90, 91), completions=(ids(6), ids(7)), pairs=(Pair(1, 0),)),
    ]
    write_dataset(groups, tmp_path / "data", Counter())
    return map_dataset(tmp_path / "data", "digest")


POLICY = {1: -1.0, 2: -4.0, 3: -2.0, 4: -9.0, 5: -3.0, 6: -5.0, 7: -6.0}
REFERENCE = np.array([-2.0, -3.0, -4.0, -5.0, -6.0, -5.0, -6.0])  # of completions 1 to 7


def by_name(batch: TreeBatch, *, per_token: bool = False) -> Tensor:
    """The policy's log-prob of each sequence, from the table."""
    sums = torch.zeros(len(batch.num_tokens), dtype=torch.float64)
    values = torch.tensor([POLICY[int(name)] for name in batch.targets], dtype=torch.float64)
    return sums.index_add(0, batch.sequences, values)


def scored(data: TokenizedDataset, *, budget: int = 1000, beta: float = 1.0) -> PairScores:
    return score_pairs(
        by_name,
        preference_data(data, REFERENCE),
        LossConfig(beta=beta),
        dtype="float32",
        layout="packed",
        budget=budget,
        device=CPU,
    )


def test_lengths_belong_to_the_completions_of_each_pair(tmp_path: Path) -> None:
    groups = [
        TokenizedGroup(prompt=ids(90), completions=(ids(1), ids(2, 2)), pairs=(Pair(1, 0),)),
        TokenizedGroup(
            prompt=ids(90), completions=(ids(3, 3, 3), ids(4), ids(5)), pairs=(Pair(2, 0), Pair(1, 2))
        ),
    ]
    write_dataset(groups, tmp_path / "lengths", Counter())
    scores = score_pairs(
        lambda batch, per_token: torch.zeros(len(batch.num_tokens)),
        preference_data(map_dataset(tmp_path / "lengths", "digest"), np.zeros(5)),
        LossConfig(),
        dtype="float32",
        layout="packed",
        budget=1000,
        device=CPU,
    )
    assert scores.chosen_tokens.tolist() == [2, 1, 1]
    assert scores.rejected_tokens.tolist() == [1, 3, 1]


def softplus(value: float) -> float:
    return math.log(1 + math.exp(value))


def test_values_by_hand(data: TokenizedDataset) -> None:
    # Log-ratios of 1 to 7: 1, -1, 2, -4, 3, 0, 0. The pairs are 1 > 2, 5 > 3, 5 > 4 and 7 > 6.
    scores = scored(data)
    assert scores.groups.tolist() == [0, 1, 1, 2]
    assert scores.chosen_rewards.tolist() == [1.0, 3.0, 3.0, 0.0]
    assert scores.rejected_rewards.tolist() == [-1.0, 2.0, -4.0, 0.0]
    assert scores.margins.tolist() == [2.0, 1.0, 7.0, 0.0]
    assert scores.correct.tolist() == [1.0, 1.0, 1.0, 0.5]  # a tie counts half
    assert scores.chosen_logps.tolist() == [-1.0, -3.0, -3.0, -6.0]
    assert scores.rejected_logps.tolist() == [-4.0, -2.0, -9.0, -5.0]
    assert scores.losses == pytest.approx([softplus(-2), softplus(-1), softplus(-7), math.log(2)])


def test_means_have_the_names_of_training_and_weigh_every_pair_equally(data: TokenizedDataset) -> None:
    losses = (softplus(-2) + softplus(-1) + softplus(-7) + math.log(2)) / 4
    assert scored(data).means() == pytest.approx(
        {
            "eval/loss": losses,
            "eval/rewards/chosen": 7 / 4,
            "eval/rewards/rejected": -3 / 4,
            "eval/rewards/margins": 10 / 4,
            "eval/rewards/accuracies": 3.5 / 4,
            "eval/logps/chosen": -13 / 4,
            "eval/logps/rejected": -20 / 4,
        }
    )


@pytest.mark.parametrize(("dtype", "noise"), [("float32", 2e-6), ("bfloat16", 0.02)])
def test_a_policy_equal_to_the_reference_but_for_rounding_has_an_accuracy_of_one_half(
    data: TokenizedDataset, dtype: str, noise: float
) -> None:
    near = np.array([POLICY[name] for name in range(1, 8)]) + noise * np.array([1, -1, 0.5, 1, -1, -1, 1])
    scores = score_pairs(
        by_name,
        preference_data(data, near),
        LossConfig(),
        dtype=dtype,
        layout="packed",
        budget=1000,
        device=CPU,
    )
    assert np.abs(scores.margins).min() > 0
    assert scores.means()["eval/rewards/accuracies"] == 0.5


def test_beta_scales_rewards_and_not_log_probs(data: TokenizedDataset) -> None:
    scores = scored(data, beta=0.5)
    assert scores.margins.tolist() == [1.0, 0.5, 3.5, 0.0]
    assert scores.chosen_logps.tolist() == [-1.0, -3.0, -3.0, -6.0]
    assert scores.losses[0] == pytest.approx(softplus(-1))


@pytest.mark.parametrize("budget", [1, 10, 14, 1000])
def test_values_and_order_do_not_depend_on_the_batches(data: TokenizedDataset, budget: int) -> None:
    found, expected = scored(data, budget=budget), scored(data)
    for name in ("groups", "losses", "chosen_rewards", "rejected_rewards", "chosen_logps", "rejected_logps"):
        assert getattr(found, name).tolist() == getattr(expected, name).tolist()


@pytest.mark.parametrize("world_size", [2, 5])
def test_ranks_score_every_pair_once_and_call_the_policy_equally_often(
    data: TokenizedDataset, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, parts, calls = scored(data), [], []
    monkeypatch.setattr(distributed, "world_size", lambda: world_size)
    for rank in range(world_size):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)

        def collect(mine: Any) -> Any:
            parts.append(mine)
            every_pair = np.zeros(4, mine.dtype)  # one record per pair, so that the function can finish
            every_pair["pair"] = np.arange(4)
            return [every_pair]

        monkeypatch.setattr(distributed, "gather_objects", collect)
        counted = Counter[str]()

        def counting(batch: TreeBatch, counted: Counter[str] = counted, **_: bool) -> Tensor:
            counted["calls"] += 1
            return by_name(batch) if len(batch.targets) else torch.zeros(1, dtype=torch.float64)

        both = preference_data(data, REFERENCE)
        score_pairs(
            counting, both, LossConfig(beta=1.0), dtype="float32", layout="packed", budget=8, device=CPU
        )
        calls.append(counted["calls"])
    assert len(set(calls)) == 1
    together = np.sort(np.concatenate(parts), order="pair")
    assert together["pair"].tolist() == [0, 1, 2, 3]
    assert together["chosen_rewards"].tolist() == expected.chosen_rewards.tolist()
    assert together["rejected_logps"].tolist() == expected.rejected_logps.tolist()


def test_a_real_model_agrees_with_one_sequence_at_a_time(
    make_config: Callable[..., Config],
    open_data: Callable[[Config], TokenizedDataset],
    write_jsonl: Callable[..., str],
    preference_rows: Callable[..., list[dict[str, Any]]],
    tiny_model: Path,
) -> None:
    data = open_data(make_config(write_jsonl(preference_rows(10))))
    scorer = SequenceScorer(load_model(ModelConfig(name_or_path=str(tiny_model), dtype="float32")))
    reference = np.random.default_rng(0).normal(-30, 5, len(data.keys))
    found = score_pairs(
        scorer,
        preference_data(data, reference),
        LossConfig(),
        dtype="float32",
        layout="packed",
        budget=100,
        device=CPU,
    )
    row, pair = 0, 0
    for group in (data[index] for index in range(len(data))):
        with torch.no_grad():
            logps = [float(scorer(sequence_batch([(group.prompt, c)]))) for c in group.completions]
        ratios = [value - reference[row + index] for index, value in enumerate(logps)]
        for chosen, rejected in group.pairs:
            assert found.chosen_logps[pair] == pytest.approx(logps[chosen], abs=1e-4)
            assert found.margins[pair] == pytest.approx(0.1 * (ratios[chosen] - ratios[rejected]), abs=1e-4)
            assert found.losses[pair] == pytest.approx(softplus(-found.margins[pair]), rel=1e-9)
            pair += 1
        row += len(logps)
    assert pair == len(found.losses)


@pytest.mark.parametrize("budget", [4, 1000])
def test_wpo_weighs_held_out_losses_too(data: TokenizedDataset, budget: int) -> None:
    def aligned(batch: TreeBatch, *, aligned: bool) -> Tensor:
        assert aligned
        names = torch.tensor([float(name) for name in batch.targets], dtype=torch.float64)
        second = torch.zeros(len(batch.num_tokens), dtype=torch.float64).index_add(0, batch.sequences, names)
        return torch.stack([by_name(batch), -second / 10], dim=1)

    found = score_pairs(
        aligned,
        preference_data(data, REFERENCE),
        LossConfig(beta=1.0, pair_weights="wpo"),
        dtype="float32",
        layout="packed",
        budget=budget,
        device=CPU,
    )
    plain = scored(data)
    weights = np.exp(-np.array([1 + 2, 5 + 3, 5 + 4, 7 + 6]) / 10)
    assert found.losses.tolist() == pytest.approx((weights * plain.losses).tolist(), rel=1e-12)
    assert found.chosen_rewards.tolist() == plain.chosen_rewards.tolist()


@pytest.fixture
def labelled(tmp_path: Path) -> TokenizedDataset:
    """Completions 1, 3, 5 and 7 are desirable, 2, 4 and 6 undesirable; each after a prompt of its own."""
    groups = [
        TokenizedGroup(
            prompt=ids(90, token),
            completions=(ids(token),),
            pairs=(Pair(0, NO_RIVAL) if token % 2 else Pair(NO_RIVAL, 0),),
        )
        for token in range(1, 8)
    ]
    write_dataset(groups, tmp_path / "labelled", Counter())
    return map_dataset(tmp_path / "labelled", "labelled")


@pytest.mark.parametrize("budget", [4, 1000])
@pytest.mark.parametrize("name", ["bco_pair", "apo_zero", "kto"])
def test_labelled_completions_have_rewards_and_losses_by_hand(
    labelled: TokenizedDataset, name: str, budget: int
) -> None:
    """Log-ratios 1, -1, 2, -4, 3, 0, 0: means 1.5 of the desirable, -5/3 of the others, -1/12 between."""
    data, reference, kl = labelled, REFERENCE, 0.0
    if name == "kto":
        data = with_mismatched(labelled, "data.train")
        reference = np.array(
            [value for pair in zip(REFERENCE, np.full(7, -4.5), strict=True) for value in pair]
        )
        kl = sum(POLICY.values()) / 7 + 4.5  # every completion is another prompt's once
        assert kl > 0.2
    found = score_pairs(
        by_name,
        preference_data(data, reference, mismatched=name == "kto"),
        LossConfig(type=name, beta=1.0),
        dtype="float32",
        layout="packed",
        budget=budget,
        device=CPU,
    )
    chosen, rejected = np.array([1.0, 2.0, 3.0, 0.0]), np.array([-1.0, -4.0, 0.0])
    assert found.chosen_rewards[::2].tolist() == chosen.tolist()
    assert found.rejected_rewards[1::2].tolist() == rejected.tolist()
    assert found.midpoint == pytest.approx(-1 / 12)
    assert found.correct.tolist() == [1, 1, 1, 1, 1, 0, 1]
    means = found.means()
    assert means["eval/rewards/margins"] == pytest.approx(1.5 + 5 / 3 - (4 - 3) / 7 * (1.5 - 5 / 3 + 1 / 6))
    assert means["eval/rewards/accuracies"] == pytest.approx(6 / 7)
    assert means["eval/logps/rejected"] == pytest.approx((-4 - 9 - 5) / 3)
    by_hand = {
        "bco_pair": (np.log1p(np.exp(-chosen - 1 / 12)), np.log1p(np.exp(rejected + 1 / 12))),
        "apo_zero": (1 / (1 + np.exp(chosen)), 1 / (1 + np.exp(-rejected))),
        "kto": (1 / (1 + np.exp(chosen - kl)), 1 / (1 + np.exp(kl - rejected))),
    }[name]
    assert found.losses[::2].tolist() == pytest.approx(by_hand[0].tolist(), rel=1e-12)
    assert found.losses[1::2].tolist() == pytest.approx(by_hand[1].tolist(), rel=1e-12)
