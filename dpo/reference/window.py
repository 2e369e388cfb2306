"""The part of a cache that a moving reference needs: the completions of the steps until it moves again.

Its batches are planned from all of these completions, not from those that the cache lacks: a build that was
interrupted goes on with the same batches, and ends with the same bits.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpo import distributed
from dpo.config import ReferenceConfig
from dpo.data.dataset import TokenizedDataset
from dpo.data.plan import BatchPlan, Int64s
from dpo.data.trees import Layout
from dpo.errors import UserError
from dpo.reference.batches import MissingPlan, plan_batches
from dpo.reference.fill import TokenScore, fill, within_memory
from dpo.reference.store import ReferenceStore
from dpo.reference.table import Float64s, halves, index_keys
from dpo.reference.values import Values, known_logps, known_token_logps


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowValues:
    """What one reference says of the steps that train against it."""

    values: Values
    """(S,) log-probs in nats of the data set's sequences, or (N,) of its completion tokens; NaN outside."""
    digest: str
    """SHA-256 (hex) of keys and summed log-probs of the sequences of these steps."""


def sequences_of(dataset: TokenizedDataset, plan: BatchPlan, steps: range) -> Int64s:
    """The distinct sequences that these optimizer steps train on, in the order of their keys.

    Args:
        dataset: The training data.
        plan: Of the run; used by nothing else meanwhile.
        steps: Numbers of steps, at least one.
    """
    groups = np.unique(np.concatenate([plan.step(number).groups for number in steps]))
    sequences = dataset.values_of(np.arange(len(dataset.keys)), groups).astype(np.int64)
    _, distinct = index_keys(dataset.keys[sequences])
    sequences = sequences[distinct]
    return sequences[np.lexsort(halves(dataset.keys[sequences]))]


def fill_window(
    score: TokenScore,
    dataset: TokenizedDataset,
    sequences: Int64s,
    store: ReferenceStore,
    options: ReferenceConfig,
    *,
    layout: Layout,
    windows: Sequence[int | None],
) -> float:
    """Computes the batches of these sequences that the cache does not have whole. All ranks must call it.

    Args:
        score: The reference model; every rank calls it equally often.
        dataset: The training data.
        sequences: From `sequences_of`.
        store: The cache of that model; it is made if there is none.
        options: Batch budget, flush interval, and whether to store log-probs per token.
        layout: How batches are laid out.
        windows: How far back the model's layers look; see `TreeBatch.to`.

    Returns:
        The seconds that took; 0 where the cache has all.

    Raises:
        UserError: As `fill`, or the cache is damaged.
    """
    with within_memory(options) as budget:
        plan = plan_batches([dataset], sequences, layout, budget)
        lacking = distributed.on_main(
            lambda: _lacking(plan, dataset, store, per_token=options.store_token_logps)
        )
        if not lacking:
            return 0.0
        mine = distributed.turns_of(lacking)
        return fill(score, [dataset], plan, mine, store, options, layout=layout, windows=windows)


def window_values(
    dataset: TokenizedDataset, sequences: Int64s, store: ReferenceStore, *, per_token: bool
) -> WindowValues:
    """The values of these sequences, from the cache alone. All ranks must call it.

    Args:
        dataset: The training data.
        sequences: From `sequences_of`.
        store: The cache.
        per_token: Whether the loss weighs tokens.

    Raises:
        UserError: The cache lacks some, or is damaged.
    """

    def read() -> WindowValues:
        sums = known_logps([dataset], store)[0]
        if lost := int(np.isnan(sums[sequences]).sum()):
            raise UserError(
                f"{store.path}: the cache lacks {lost} of the {len(sequences)} completions that were "
                "scored by the policy of an earlier step: it was deleted or pruned. Restore it, or resume "
                "from a checkpoint before that step (train.resume)"
            )
        values = known_token_logps(dataset, store) if per_token else sums
        return WindowValues(values=values, digest=_digest(dataset, sequences, sums))

    return distributed.on_main(read)


def _lacking(
    plan: MissingPlan, dataset: TokenizedDataset, store: ReferenceStore, *, per_token: bool
) -> list[int]:
    """The batches of which the cache lacks a sequence."""
    store.create()
    table = store.load(with_tokens=per_token).index
    batches = (np.concatenate(plan.batch(number)) for number in range(plan.num_batches))
    return [
        number
        for number, rows in enumerate(batches)
        if (table.find(dataset.keys[rows.astype(int)]) < 0).any()
    ]


def _digest(dataset: TokenizedDataset, sequences: Int64s, sums: Float64s) -> str:
    found = hashlib.sha256(np.ascontiguousarray(dataset.keys[sequences]).tobytes())
    found.update(np.ascontiguousarray(sums[sequences]).tobytes())
    return found.hexdigest()
