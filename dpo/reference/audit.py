"""Is the cache what the model says? A few rows recomputed, and what a run records of the rows that it uses.

A fresh run recomputes rows with the policy, which then still is the reference. A resumed run cannot: its
policy has moved, so it checks that identity and rows are those that it started with.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dpo import distributed
from dpo.data.dataset import TokenizedDataset
from dpo.data.trees import TreeBatch, sequence_batch
from dpo.errors import UserError
from dpo.reference.store import ReferenceStore
from dpo.reference.table import Float64s, tolerance

RECORD_FILE = "reference.json"
SAMPLE_SEED = 0
SHOWN_ROWS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditResult:
    """What the comparison of R rows found."""

    rows: int
    largest: float
    """Largest difference between a cached and a recomputed log-prob, in nats."""
    share: float
    """The same as a share of what that row's tolerance allows; above 1 it is a mismatch."""


def audit(
    score: Callable[[TreeBatch], Tensor],
    datasets: Sequence[TokenizedDataset],
    references: Sequence[Float64s],
    store: ReferenceStore,
    *,
    num_rows: int,
    seed: int = SAMPLE_SEED,
) -> AuditResult:
    """Recomputes random rows and compares them with the cache. All ranks must call it.

    Args:
        score: The reference model: a batch of S rows on this rank's device -> (S,) log-probs in nats.
        datasets: Where the token ids are.
        references: (S,) cached log-probs of each data set's sequences, in nats.
        store: The cache, for its compute type and its name.
        num_rows: Rows to recompute; all of them if there are fewer.
        seed: Which ones.

    Raises:
        UserError: A difference beyond the tolerance for the compute type; the message shows the rows.
    """
    ends = np.cumsum([len(reference) for reference in references])
    chosen = np.random.default_rng(seed).choice(ends[-1], min(num_rows, ends[-1]), replace=False)
    mine = chosen[distributed.rank() :: distributed.world_size()].tolist()
    calls = -(-len(chosen) // distributed.world_size())  # equally many on all ranks, for sharded weights
    compared = []
    for sequence in [*mine, *[None] * (calls - len(mine))]:
        place = None if sequence is None else int(np.searchsorted(ends, sequence, side="right"))
        index = 0 if place is None else sequence - int(ends[place] - len(references[place]))
        rows = [] if place is None else [datasets[place].sequence(index)]
        with torch.no_grad():
            logps = score(sequence_batch(rows).to(distributed.device()))
        if place is not None:
            compared.append((len(rows[0][1]), float(references[place][index]), float(logps[0])))
    everything = np.array([row for part in distributed.gather_objects(compared) for row in part])
    tokens, cached, recomputed = everything.T
    differences = np.abs(cached - recomputed)
    allowed = tolerance(store.identity.dtype, tokens)
    shares = differences / allowed
    if not (shares <= 1).all():  # a NaN is a mismatch too
        wrong = np.flatnonzero(~(shares <= 1))
        shown = "".join(
            f"\n  {int(tokens[row])} tokens: cached {cached[row]:.6f}, recomputed {recomputed[row]:.6f} "
            f"nats, allowed difference {allowed[row]:.2g}"
            for row in wrong[:SHOWN_ROWS]
        )
        raise UserError(
            f"{store.path}: audit failed: {len(wrong)} of {len(everything)} recomputed rows differ from the "
            "cache. The cache is not of this model, or this machine computes something else; check with dpo "
            "cache verify --recompute, delete the folder and run precompute-ref again "
            f"(reference.audit_rows: 0 trusts it){shown}"
        )
    worst = int(np.argmax(shares))
    return AuditResult(rows=len(everything), largest=float(differences.max()), share=float(shares[worst]))


def record_rows(
    run_dir: Path, store: ReferenceStore, datasets: Sequence[TokenizedDataset], references: Sequence[Float64s]
) -> None:
    """Writes RUN_DIR/reference.json: the identity, and a digest of the keys and values that the run uses."""
    if distributed.is_main():
        content = json.dumps(_record(store, datasets, references), indent=2)
        (run_dir / RECORD_FILE).write_text(content + "\n")


def check_rows(
    run_dir: Path, store: ReferenceStore, datasets: Sequence[TokenizedDataset], references: Sequence[Float64s]
) -> None:
    """Raises UserError unless the run that `record_rows` wrote about used this reference and these values."""

    def compare() -> None:
        file = run_dir / RECORD_FILE
        try:
            then = json.loads(file.read_text())
            identity, rows = str(then["identity"]), str(then["rows"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{file}: cannot tell which reference the run started with ({error!r}); put the file back, "
                "or set reference.audit_rows: 0 to go on unchecked"
            ) from error
        now = _record(store, datasets, references)
        if identity != now["identity"]:
            raise UserError(
                f"{run_dir}: the run started with reference {identity[:16]}, and the model's files are now "
                f"{now['identity'][:16]}: they were changed. Put them back, or start in another run_dir"
            )
        if rows != now["rows"]:
            raise UserError(
                f"{run_dir}: the run started with other reference values than {store.path} has now: it was "
                "rebuilt or pruned. Put the old cache back, or set reference.audit_rows: 0 to go on with "
                "values that differ by rounding"
            )

    distributed.on_main(compare)


def _record(
    store: ReferenceStore, datasets: Sequence[TokenizedDataset], references: Sequence[Float64s]
) -> dict[str, str]:
    rows = hashlib.sha256()
    for dataset, reference in zip(datasets, references, strict=True):
        rows.update(np.ascontiguousarray(dataset.keys).tobytes())
        rows.update(np.ascontiguousarray(reference).tobytes())
    return {"identity": store.identity.digest, "rows": rows.hexdigest()}
