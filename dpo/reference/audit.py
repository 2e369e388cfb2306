"""Does the cache hold what the model computes, and is it the cache that the run started with?

A new run recomputes a few rows with the reference model, often the untrained policy. A resumed run, whose
policy has been trained, compares its rows with the record that it wrote when it started.
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
from dpo.files import write_file
from dpo.reference.batches import place_of
from dpo.reference.store import ReferenceStore
from dpo.reference.table import Float64s, tolerance

RECORD_FILE = "reference.json"
SAMPLE_SEED = 0
SHOWN_ROWS = 5
NOISE_FACTOR, MOST_NOISE = 5.0, 8.0
"""In bfloat16, rows may differ by this factor times what they move when they are computed beside others, and
never by more than the second times the tolerance of dense models."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditResult:
    """What the comparison of R rows found."""

    rows: int
    largest: float
    """Largest difference between a cached and a recomputed log-prob, in nats."""
    share: float
    """Largest difference as a share of the tolerance for its row; at most 1."""


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
        datasets: The data sets that the rows are drawn from.
        references: (S,) cached log-probs of each data set's sequences, in nats.
        store: The cache, for its compute type and its name.
        num_rows: Number of rows to recompute; all if there are fewer.
        seed: Decides which rows are drawn.

    Raises:
        UserError: A difference beyond the tolerance for the compute type; the message shows the rows.
    """
    total = sum(map(len, references))
    drawn = np.random.default_rng(seed).choice(total, min(num_rows, total), replace=False)
    tokens, cached, recomputed = _recompute(score, datasets, references, drawn.tolist()).T
    differences, allowed = np.abs(cached - recomputed), tolerance(store.identity.dtype, tokens)
    if store.identity.dtype == "bfloat16" and (differences > allowed).any():
        beside = _recompute(score, datasets, references, drawn.tolist(), beside=True)[:, 2]
        allowed = _measured(np.abs(beside - recomputed), tokens, allowed)
    wrong = ~(differences <= allowed)  # a NaN is a mismatch too
    if wrong.any():
        rows = np.stack([tokens, cached, recomputed, allowed], axis=1)
        raise _mismatch(store.path, rows[wrong], len(rows))
    shares = differences / allowed
    return AuditResult(rows=len(tokens), largest=float(differences.max()), share=float(shares.max()))


def _measured(noise: Float64s, tokens: Float64s, allowed: Float64s) -> Float64s:
    """(R,) allowed differences of a model whose rounding is larger than that of the dense models measured.

    Where a token's experts are nearly tied, rounding exchanges them, and log-probs move several times more.

    Args:
        noise: (R,) by how much each row's log-prob moves when it is computed beside another.
        tokens: (R,) completion tokens.
        allowed: (R,) of dense models.
    """
    typical = float(np.sqrt(np.mean(noise**2 / tokens)))
    return np.clip(NOISE_FACTOR * typical * np.sqrt(tokens), allowed, MOST_NOISE * allowed)


def _recompute(
    score: Callable[[TreeBatch], Tensor],
    datasets: Sequence[TokenizedDataset],
    references: Sequence[Float64s],
    rows: Sequence[int],
    *,
    beside: bool = False,
) -> Float64s:
    """(R, 3) completion tokens, cached and recomputed log-prob of each row, gathered from all ranks.

    Sharded weights need every rank in every forward pass: a rank that has no row left scores an empty batch.

    Args:
        score: See `audit`.
        datasets: See `audit`.
        references: See `audit`.
        rows: Numbers of sequences.
        beside: Compute each row in a batch with the next.
    """
    compared: list[tuple[int, float, float]] = []
    for turn in distributed.turns_of(range(len(rows))):
        number, index = (0, 0) if turn is None else place_of(datasets, rows[turn])
        sequences = [] if turn is None else [datasets[number].sequence(index)]
        if turn is not None and beside:
            other, place = place_of(datasets, rows[(turn + 1) % len(rows)])
            sequences.append(datasets[other].sequence(place))
        with torch.no_grad():
            logps = score(sequence_batch(sequences).to(distributed.device()))
        if sequences:
            cached = float(references[number][index])
            compared.append((len(sequences[0][1]), cached, float(logps[0])))
    return np.array([row for part in distributed.gather_objects(compared) for row in part])


def _mismatch(place: Path, wrong: Float64s, num_rows: int) -> UserError:
    """The error that shows (W, 4) wrong rows: tokens, cached, recomputed, allowed difference."""
    shown = "".join(
        f"\n  {int(tokens)} tokens: cached {cached:.6f}, recomputed {recomputed:.6f} nats, "
        f"allowed difference {allowed:.2g}"
        for tokens, cached, recomputed, allowed in wrong[:SHOWN_ROWS]
    )
    return UserError(
        f"{place}: audit failed: {len(wrong)} of {num_rows} recomputed rows differ from the cache. "
        "The cache does not belong to this model, or this machine computes other values. Check with "
        "dpo cache verify --recompute, or delete the folder and run precompute-ref again "
        f"(reference.audit_rows: 0 skips the audit){shown}"
    )


def record_rows(
    run_dir: Path, store: ReferenceStore, datasets: Sequence[TokenizedDataset], references: Sequence[Float64s]
) -> None:
    """Writes RUN_DIR/reference.json: the identity, and a digest of the keys and values that the run uses."""
    if distributed.is_main():
        content = json.dumps(_record(store, datasets, references), indent=2)
        write_file(run_dir / RECORD_FILE, content + "\n")


def check_rows(
    run_dir: Path, store: ReferenceStore, datasets: Sequence[TokenizedDataset], references: Sequence[Float64s]
) -> None:
    """Raises UserError unless `record_rows` recorded the same reference and the same values for this run."""

    def compare() -> None:
        file = run_dir / RECORD_FILE
        try:
            recorded = json.loads(file.read_text())
            identity, rows = str(recorded["identity"]), str(recorded["rows"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{file}: cannot tell which reference the run started with ({error!r}); restore the file, "
                "or set reference.audit_rows: 0 to resume unchecked"
            ) from error
        now = _record(store, datasets, references)
        if identity != now["identity"]:
            raise UserError(
                f"{run_dir}: the run started with reference {identity[:16]}, and the model's files are now "
                f"{now['identity'][:16]}: they were changed. Restore them, or start in another run_dir"
            )
        if rows != now["rows"]:
            raise UserError(
                f"{run_dir}: the run started with other reference values than {store.path} has now: the "
                "cache was rebuilt or pruned. Restore the old cache, or set reference.audit_rows: 0 to "
                "resume with values that differ by rounding"
            )

    distributed.on_main(compare)


def _record(
    store: ReferenceStore, datasets: Sequence[TokenizedDataset], references: Sequence[Float64s]
) -> dict[str, str]:
    """The content of reference.json."""
    rows = hashlib.sha256()
    for dataset, reference in zip(datasets, references, strict=True):
        rows.update(np.ascontiguousarray(dataset.keys).tobytes())
        rows.update(np.ascontiguousarray(reference).tobytes())
    return {"identity": store.identity.digest, "rows": rows.hexdigest()}
