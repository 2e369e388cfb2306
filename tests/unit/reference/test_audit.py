"""A correct cache passes, a wrong value is found and shown, and a resumed run needs the same values."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from unit.reference.samples import IDENTITY, fill

from dpo import distributed
from dpo.config import Config
from dpo.data.dataset import TokenizedDataset
from dpo.data.records import sequence_key
from dpo.data.trees import TreeBatch
from dpo.errors import UserError
from dpo.model.load import load_model
from dpo.model.scorer import SequenceScorer
from dpo.reference.audit import RECORD_FILE, AuditResult, audit, check_rows, record_rows
from dpo.reference.identity import reference_identity
from dpo.reference.store import ReferenceStore
from dpo.reference.table import Float64s, ReferenceRows
from dpo.reference.values import reference_logps

Rows = list[dict[str, Any]]


class FakeModel:
    """Gives every row the log-prob -(its number of tokens), and records which rows it scored."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []
        self.error = 0.0

    def __call__(self, batch: TreeBatch) -> Tensor:
        if len(batch.targets):
            for row, (prompt, completion) in zip(batch.input_ids, batch.trees, strict=True):
                ids = row.numpy().astype(np.int32)
                self.seen.append(sequence_key(ids[:prompt], ids[prompt : prompt + completion]))
        return -batch.num_tokens.double() + self.error


@pytest.fixture
def model() -> FakeModel:
    return FakeModel()


@pytest.fixture
def datasets(
    experiment: Callable[[Rows], tuple[Config, TokenizedDataset]], preference_rows: Callable[..., Rows]
) -> list[TokenizedDataset]:
    return [experiment(preference_rows(6))[1], experiment(preference_rows(4, seed=1))[1]]


@pytest.fixture
def references(datasets: list[TokenizedDataset]) -> list[Float64s]:
    """The log-probs of the fake model."""
    return [-dataset.completion_tokens.astype(np.float64) for dataset in datasets]


@pytest.fixture
def store(tmp_path: Path) -> ReferenceStore:
    return ReferenceStore(tmp_path / "cache", IDENTITY)


@pytest.mark.parametrize(
    ("moves", "error", "passes"),
    [(0.0, 0.3, False), (0.3, 0.8, True), (0.3, 2.5, False), (9.0, 1.5, True), (9.0, 2.5, False)],
)
def test_in_bfloat16_the_tolerance_follows_from_how_rows_move_in_other_batches(
    datasets: list[TokenizedDataset],
    references: list[Float64s],
    tmp_path: Path,
    moves: float,
    error: float,
    passes: bool,
) -> None:
    """`moves` and `error` in nats per root of a row's tokens; a mixture of experts moves by more."""
    store = ReferenceStore(tmp_path / "cache", replace(IDENTITY, dtype="bfloat16"))

    def score(batch: TreeBatch) -> Tensor:
        root = batch.num_tokens.double().sqrt()
        return -batch.num_tokens.double() + error * root + moves * root * (len(root) > 1)

    if passes:
        assert audit(score, datasets, references, store, num_rows=6).share <= 1
    else:
        with pytest.raises(UserError, match="audit failed"):
            audit(score, datasets, references, store, num_rows=6)


def test_a_correct_cache_passes_with_a_real_model(
    experiment: Callable[[Rows], tuple[Config, TokenizedDataset]], preference_rows: Callable[..., Rows]
) -> None:
    config, data = experiment(preference_rows(8))
    root = Path(config.reference.cache_dir)
    store = ReferenceStore(root, reference_identity(config.model, root))
    fill(config, [data], store)
    scorer = SequenceScorer(load_model(config.model))
    references = reference_logps([data], store, "")
    result = audit(scorer, [data], references, store, num_rows=10**6)
    assert result.rows == len(data.keys)
    assert result.share <= 1


@pytest.mark.parametrize("row", [0, 5, -1])
def test_one_wrong_value_in_a_cache_built_by_hand_is_found_and_both_numbers_shown(
    experiment: Callable[[Rows], tuple[Config, TokenizedDataset]],
    preference_rows: Callable[..., Rows],
    row: int,
) -> None:
    config, data = experiment(preference_rows(5))
    root = Path(config.reference.cache_dir)
    store = ReferenceStore(root, reference_identity(config.model, root))
    fill(config, [data], store)
    (right,) = reference_logps([data], store, "")
    wrong = right.copy()
    wrong[row] += 0.001
    by_hand = ReferenceStore(root.with_name("by_hand"), store.identity)
    by_hand.create()
    lengths = data.completion_tokens.astype(np.int32)
    by_hand.append(ReferenceRows(keys=np.asarray(data.keys), logps=wrong, num_tokens=lengths))
    scorer = SequenceScorer(load_model(config.model))
    references = reference_logps([data], by_hand, "")
    with pytest.raises(UserError) as raised:
        audit(scorer, [data], references, by_hand, num_rows=len(right))
    assert f"{by_hand.path}: audit failed: 1 of {len(right)} " in str(raised.value)
    (shown,) = str(raised.value).splitlines()[1:]
    numbers = [float(number) for number in re.findall(r"-?\d+\.\d+|\d+(?= tokens)", shown)]
    assert numbers[:2] == [lengths[row], round(wrong[row], 6)]
    assert numbers[2] == pytest.approx(right[row], abs=1e-4)


def test_every_row_is_compared_with_its_own_value(
    model: FakeModel, datasets: list[TokenizedDataset], references: list[Float64s], store: ReferenceStore
) -> None:
    total = sum(map(len, references))
    result = audit(model, datasets, references, store, num_rows=total)
    assert result == AuditResult(rows=total, largest=0.0, share=0.0)
    expected = [bytes(key.tobytes()) for dataset in datasets for key in dataset.keys]
    assert sorted(model.seen) == sorted(expected)


def test_if_more_rows_are_asked_for_than_there_are_all_are_compared(
    model: FakeModel, datasets: list[TokenizedDataset], references: list[Float64s], store: ReferenceStore
) -> None:
    assert audit(model, datasets, references, store, num_rows=10**9).rows == sum(map(len, references))


def test_rows_are_drawn_at_random_and_the_same_for_the_same_seed(
    model: FakeModel, datasets: list[TokenizedDataset], references: list[Float64s], store: ReferenceStore
) -> None:
    drawn = []
    for seed in (0, 0, 1):
        model.seen.clear()
        assert audit(model, datasets, references, store, num_rows=7, seed=seed).rows == 7
        drawn.append([*model.seen])
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 7
    assert audit(model, datasets, references, store, num_rows=1).rows == 1


@pytest.mark.parametrize(("dtype", "unit"), [("float32", 2e-5), ("bfloat16", 0.25)])
@pytest.mark.parametrize("sign", [-1, 1])
def test_differences_up_to_the_tolerance_pass_and_larger_ones_fail(
    model: FakeModel,
    datasets: list[TokenizedDataset],
    references: list[Float64s],
    dtype: Any,
    unit: float,
    sign: int,
) -> None:
    store = ReferenceStore(Path("cache"), replace(IDENTITY, dtype=dtype))
    total = sum(map(len, references))
    least = min(int(dataset.completion_tokens.min()) for dataset in datasets)
    allowed = unit * least**0.5
    model.error = sign * 0.99 * allowed
    result = audit(model, datasets, references, store, num_rows=total)
    assert (result.largest, result.share) == pytest.approx((0.99 * allowed, 0.99))
    model.error = sign * 1.01 * allowed
    with pytest.raises(UserError, match=rf"(?s)audit failed: .* allowed difference {allowed:.2g}"):
        audit(model, datasets, references, store, num_rows=total)


def test_of_many_wrong_rows_the_first_few_are_shown(
    model: FakeModel, datasets: list[TokenizedDataset], references: list[Float64s], store: ReferenceStore
) -> None:
    model.error, total = 1.0, sum(map(len, references))
    with pytest.raises(UserError, match=rf"{total} of {total} ") as raised:
        audit(model, datasets, references, store, num_rows=total)
    assert str(raised.value).count("\n") == 5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_not_finite_fails(
    model: FakeModel,
    datasets: list[TokenizedDataset],
    references: list[Float64s],
    store: ReferenceStore,
    value: float,
) -> None:
    model.error = value
    with pytest.raises(UserError, match=rf"(?s)audit failed: 3 of 3 .* recomputed {value:.6f} nats") as e:
        audit(model, datasets, references, store, num_rows=3)
    assert "allowed difference nan" not in str(e.value)


def test_the_ranks_share_the_rows_and_make_the_same_number_of_passes(
    datasets: list[TokenizedDataset],
    references: list[Float64s],
    store: ReferenceStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone = FakeModel()
    audit(alone, datasets, references, store, num_rows=7)
    calls, seen = [], []
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        model, count = FakeModel(), iter(range(99))
        audit(
            lambda batch, model=model, count=count: (next(count), model(batch))[1],
            datasets,
            references,
            store,
            num_rows=7,
        )
        calls.append(next(count))
        seen += model.seen
    assert calls == [3, 3, 3]
    assert sorted(seen) == sorted(alone.seen)


@pytest.fixture
def run_dir(
    tmp_path: Path, store: ReferenceStore, datasets: list[TokenizedDataset], references: list[Float64s]
) -> Path:
    """A run that was started."""
    folder = tmp_path / "run"
    folder.mkdir()
    record_rows(folder, store, datasets, references)
    return folder


def test_a_run_resumes_with_the_values_it_started_with(
    run_dir: Path,
    store: ReferenceStore,
    datasets: list[TokenizedDataset],
    references: list[Float64s],
    tmp_path: Path,
) -> None:
    check_rows(run_dir, store, datasets, [reference.copy() for reference in references])
    renamed = replace(IDENTITY, weights={"other.safetensors": IDENTITY.weights["model.safetensors"]})
    check_rows(run_dir, ReferenceStore(tmp_path / "moved", renamed), datasets, references)
    record = json.loads((run_dir / RECORD_FILE).read_text())
    assert record["identity"] == IDENTITY.digest


def test_a_value_that_changed_by_the_last_bit_is_refused(
    run_dir: Path, store: ReferenceStore, datasets: list[TokenizedDataset], references: list[Float64s]
) -> None:
    references[1][-1] = np.nextafter(references[1][-1], 0)
    with pytest.raises(UserError, match=rf"{run_dir}: .* other reference values than {store.path} "):
        check_rows(run_dir, store, datasets, references)


def test_other_data_with_the_same_values_are_refused(
    run_dir: Path,
    store: ReferenceStore,
    datasets: list[TokenizedDataset],
    references: list[Float64s],
) -> None:
    swapped = datasets[0].keys.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    with pytest.raises(UserError, match=rf"{run_dir}: .* other reference values"):
        check_rows(run_dir, store, [replace(datasets[0], keys=swapped), datasets[1]], references)
    with pytest.raises(UserError, match=rf"{run_dir}: .* other reference values"):
        check_rows(run_dir, store, datasets[:1], references[:1])


def test_a_reference_that_changed_is_refused_with_both_identities(
    run_dir: Path, store: ReferenceStore, datasets: list[TokenizedDataset], references: list[Float64s]
) -> None:
    other = replace(IDENTITY, weights={"model.safetensors": "bb" * 32})
    with pytest.raises(UserError, match=rf"{run_dir}: .*{IDENTITY.digest[:16]}.*{other.digest[:16]}"):
        check_rows(run_dir, ReferenceStore(store.cache_dir, other), datasets, references)


@pytest.mark.parametrize("damage", [None, "{", "[]", "{}", '{"identity": "x"}'])
def test_a_run_without_a_readable_record_is_refused(
    run_dir: Path,
    store: ReferenceStore,
    datasets: list[TokenizedDataset],
    references: list[Float64s],
    damage: str | None,
) -> None:
    file = run_dir / RECORD_FILE
    file.unlink() if damage is None else file.write_text(damage)
    with pytest.raises(UserError, match=rf"{file}: "):
        check_rows(run_dir, store, datasets, references)


def test_only_rank_0_writes_the_record(
    tmp_path: Path,
    store: ReferenceStore,
    datasets: list[TokenizedDataset],
    references: list[Float64s],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    record_rows(tmp_path / "not made", store, datasets, references)
    assert not (tmp_path / "not made").exists()


def test_an_audit_builds_no_graph(model: FakeModel, datasets: list[TokenizedDataset]) -> None:
    weight = torch.ones((), requires_grad=True)
    graphs: list[bool] = []

    def score(batch: TreeBatch) -> Tensor:
        logps = model(batch) * weight
        graphs.append(logps.requires_grad)
        return logps

    references = [-dataset.completion_tokens.astype(np.float64) for dataset in datasets]
    audit(score, datasets, references, ReferenceStore(Path("cache"), IDENTITY), num_rows=2)
    assert graphs == [False, False]
