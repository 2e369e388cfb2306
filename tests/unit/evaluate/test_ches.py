"""CHES by hand, against hidden states of single rows, and as a prediction of what a gradient step does."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo.config import ModelConfig
from dpo.data.dataset import TokenizedDataset, map_dataset, write_dataset
from dpo.data.records import Pair, TokenizedGroup
from dpo.data.trees import Layout, tree_batch
from dpo.engine.scoring import make_scorer
from dpo.evaluate.ches import ches_of, sample_pairs, score_ches
from dpo.evaluate.data_facts import pair_trees
from dpo.model.load import load_model
from dpo.model.scorer import SequenceScorer

PAIRS = 40
TOKENS = 16


@pytest.fixture(scope="module")
def scorer(tiny_model: Path) -> SequenceScorer:
    config = ModelConfig(name_or_path=str(tiny_model), dtype="float32")
    return make_scorer(load_model(config), config).eval()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenizedDataset:
    """Pairs whose rejected completion has from none to all of the chosen one's tokens replaced."""
    rng = np.random.default_rng(0)
    groups = []
    for number in range(PAIRS):
        prompt = rng.integers(0, 280, rng.integers(2, 9)).astype(np.int32)
        chosen = rng.integers(0, 280, TOKENS).astype(np.int32)
        rejected, replaced = chosen.copy(), 1 + number * (TOKENS - 1) // (PAIRS - 1)
        rejected[rng.permutation(TOKENS)[:replaced]] = rng.integers(0, 280, replaced)
        extra = (rng.integers(0, 280, 3).astype(np.int32),)
        groups.append(
            TokenizedGroup(prompt=prompt, completions=(rejected, *extra, chosen), pairs=(Pair(2, 0),))
        )
    folder = tmp_path_factory.mktemp("ches") / "data"
    write_dataset(groups, folder, Counter())
    return map_dataset(folder, "digest")


def test_by_hand() -> None:
    # Pair 1: S+ = (1, 2), S- = (3, 0): <S+, S-> = 3, |S+|^2 = 5, so CHES is -2. With 2 and 3 tokens the means
    # are (0.5, 1) and (1, 0): <M+, M-> = 0.5, |M+|^2 = 1.25, so -0.75, and the likeness is 0.5 / 1.25 = 0.4.
    # Pair 2: S- = S+, with one token each: CHES is 0 and the likeness 1.
    sums = np.array([[[1.0, 2.0], [3.0, 0.0]], [[2.0, 1.0], [2.0, 1.0]]])
    scores, per_token, likeness = ches_of(sums, np.array([[2, 3], [1, 1]]))
    np.testing.assert_allclose(scores, [-2, 0])
    np.testing.assert_allclose(per_token, [-0.75, 0])
    np.testing.assert_allclose(likeness, [0.4, 1])


@pytest.mark.parametrize("layout", ["packed", "trees", "rows"])
def test_the_states_are_those_that_predict_the_completions_of_single_rows(
    scorer: SequenceScorer, data: TokenizedDataset, layout: Layout, tiny_model: Path
) -> None:
    plain = load_model(ModelConfig(name_or_path=str(tiny_model), dtype="float32")).eval()
    pairs = np.array([3, 17, 38])
    expected = np.zeros((3, 2, 32))
    for place, (prompt, completions) in enumerate(pair_trees(data, pairs)):
        for side, completion in enumerate(completions):
            row = torch.from_numpy(np.concatenate([prompt, completion])[None].astype(np.int64))
            with torch.no_grad():
                hidden = plain(row, output_hidden_states=True).hidden_states[-1][0]
            expected[place, side] = hidden[len(prompt) - 1 : -1].double().sum(0).numpy()
    scores, per_token, likeness = ches_of(expected, np.full((3, 2), TOKENS))
    found = score_ches(scorer, data, pairs, layout=layout, budget=64)  # a batch a pair
    np.testing.assert_allclose(found.scores, scores, rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(found.per_token, per_token, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.likeness, likeness, rtol=1e-4, atol=1e-5)


def test_the_batches_do_not_matter(scorer: SequenceScorer, data: TokenizedDataset) -> None:
    pairs = np.arange(PAIRS)
    small, large = (
        score_ches(scorer, data, pairs, layout="packed", budget=budget) for budget in (100, 10_000)
    )
    np.testing.assert_allclose(small.per_token, large.per_token, rtol=1e-4, atol=1e-4)


def test_it_predicts_where_a_gradient_step_lowers_the_chosen_log_prob(
    scorer: SequenceScorer, data: TokenizedDataset
) -> None:
    """A step of DPO on one pair moves its chosen log-prob by a multiple of |g+|^2 - <g+, g->, to first order.

    g+ and g- are the gradients of the two log-probs (at policy = reference, the loss's gradient is their
    difference times a constant).
    """
    pairs = np.arange(PAIRS)
    parameters = [*scorer.model.parameters()]
    changes = []
    for tree in pair_trees(data, pairs):
        logps = scorer(tree_batch([tree], "packed"))
        chosen = torch.autograd.grad(logps[0], parameters, retain_graph=True)
        rejected = torch.autograd.grad(logps[1], parameters)
        changes.append(sum(float((c * (c - r)).sum()) for c, r in zip(chosen, rejected, strict=True)))
    found = score_ches(scorer, data, pairs, layout="packed", budget=1000)
    for name in ("scores", "per_token", "likeness"):
        assert rank_correlation(getattr(found, name), np.array(changes)) < -0.5, name


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    ranks = [np.argsort(np.argsort(values)) for values in (one, other)]
    return float(np.corrcoef(*ranks)[0, 1])


def test_a_sample_is_random_and_the_same_every_time(data: TokenizedDataset) -> None:
    drawn = sample_pairs(data, 10)
    assert np.array_equal(drawn, sample_pairs(data, 10))
    assert np.array_equal(drawn, np.unique(drawn))
    assert drawn.max() > 10
    assert sample_pairs(data, 1000).tolist() == [*range(PAIRS)]
