"""Does CHES predict where the chosen log-prob falls? Measured on a finished run; docs/data-report.md.

    make demo && python -m benchmarks.ches --config configs/demo.yaml

CHES of random pairs under the model that training started from, against the change of their chosen log-prob
from that model to the trained one.
"""

import argparse
from typing import cast

import numpy as np
import numpy.typing as npt
import torch

from dpo import distributed
from dpo.cli.parse import parse
from dpo.commands.check import finished_model
from dpo.commands.inputs import open_held_out, quieten_libraries
from dpo.config import Config, ModelConfig
from dpo.data.dataset import TokenizedDataset
from dpo.data.trees import tree_batch
from dpo.engine.frozen import frozen_scorer
from dpo.engine.scoring import settle_layout, token_budget
from dpo.evaluate.ches import ChesScores, Int64s, sample_pairs, score_ches
from dpo.evaluate.data_facts import pair_trees
from dpo.model.load import DTYPES
from dpo.model.probe_trees import probe_trees

Float64s = npt.NDArray[np.float64]
RESAMPLES = 2000


def main() -> None:
    """Prints a table for training and held-out pairs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=1000)
    options, keys = parser.parse_known_args()
    config = cast(Config, parse("evaluate", keys))
    quieten_libraries()
    distributed.start()
    train_data, test_data, _ = open_held_out(config.data, config.model, "benchmarks.ches")
    for name, data in (("training", train_data), ("held-out", test_data)):
        pairs = sample_pairs(data, options.pairs)
        ches, before = _measured(config.model, data, pairs)
        _, after = _measured(finished_model(config), data, pairs)
        _report(name, ches, after - before)


def _measured(model: ModelConfig, data: TokenizedDataset, pairs: Int64s) -> tuple[ChesScores, Float64s]:
    """CHES of the pairs, and the (N,) log-probs of their chosen completions in nats."""
    trees = [(prompt, completions[:1]) for prompt, completions in pair_trees(data, pairs)]
    with frozen_scorer(model, sharded=False) as scorer:
        layout = settle_layout(scorer, probe_trees([data]), DTYPES[model.dtype]).layout
        ches = score_ches(scorer, data, pairs, layout=layout, budget=token_budget(None))
        with torch.no_grad():
            logps = [
                scorer(tree_batch(trees[start : start + 16], layout)) for start in range(0, len(trees), 16)
            ]
    return ches, torch.cat(logps).numpy()


def _report(name: str, ches: ChesScores, change: Float64s) -> None:
    print(f"{name}: {len(change)} pairs, chosen log-prob {change.mean():+.2f} nats, fell in {_fell(change)}")
    for label, values in (
        ("CHES", ches.scores),
        ("CHES, length-normalised", ches.per_token),
        ("likeness", ches.likeness),
    ):
        order = np.argsort(values)
        quarter = len(order) // 4
        low, high = change[order[:quarter]], change[order[-quarter:]]
        rng = np.random.default_rng(0)
        draws = [rng.integers(len(change), size=len(change)) for _ in range(RESAMPLES)]
        ends = np.quantile([_rank_correlation(values[draw], change[draw]) for draw in draws], [0.025, 0.975])
        print(
            f"  {label:<24} rank correlation {_rank_correlation(values, change):+.2f} "
            f"[{ends[0]:+.2f}, {ends[1]:+.2f}]; lowest quarter {low.mean():+.2f} nats, fell in {_fell(low)}; "
            f"highest quarter {high.mean():+.2f} nats, fell in {_fell(high)}"
        )


def _fell(change: Float64s) -> str:
    return f"{(change < 0).mean():.0%}"


def _rank_correlation(one: Float64s, other: Float64s) -> float:
    """Spearman's, with ties in the order of the data."""
    first, second = (np.argsort(np.argsort(values, kind="stable"), kind="stable") for values in (one, other))
    correlations = np.asarray(np.corrcoef(first, second))
    return float(correlations[0, 1])


if __name__ == "__main__":
    main()
