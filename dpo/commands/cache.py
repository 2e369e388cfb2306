"""dpo cache: shows, verifies and prunes reference caches. Only `verify --recompute` loads a model."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from dpo import distributed, terminal
from dpo.commands.inputs import open_data
from dpo.config import Config
from dpo.data.dataset import TokenizedDataset
from dpo.engine.frozen import frozen_scorer, is_sharded
from dpo.errors import UserError
from dpo.reference.audit import audit
from dpo.reference.identity import known_names, reference_model
from dpo.reference.prune import cache_info, prune, verify
from dpo.reference.store import IDENTITY_FILE, ReferenceStore, reference_store
from dpo.reference.table import index_keys
from dpo.reference.values import reference_logps


def show_info(target: Path | Config) -> None:
    """Prints identity, rows, bytes and shards of caches; with a configuration also how many of its sequences
    are cached.

    Args:
        target: A root of caches, one cache's folder, or a configuration.
    """
    for store in _stores(target):
        info, identity = cache_info(store), store.identity
        names = known_names(identity, store.cache_dir)
        files = {
            kind: "\n".join(
                f"{name} sha256 {digest[:16]}..." for name, digest in getattr(identity, kind).items()
            )
            for kind in ("weights", "adapter", "code")
            if getattr(identity, kind)
        }
        each = f", {info.bytes / info.rows:.1f} bytes per row" if info.rows else ""
        left = f", {info.unfinished} unfinished files of killed processes" if info.unfinished else ""
        kind = f"{identity.config.get('model_type', 'unknown')}, {identity.dtype}"
        rows = {
            "identity": identity.digest,
            **files,
            "model": f"{', '.join(names) or 'its files are not on this machine'} ({kind})",
            "rows": f"{info.rows}, {info.rows_with_tokens} of them with log-probs per token{each}",
            "shards": f"{info.shards}, {info.bytes} bytes, {info.copies} duplicate rows{left}",
        }
        if isinstance(target, Config):
            table = store.load()
            for split, dataset in _datasets(target).items():
                found = int((table.index.find(dataset.keys) >= 0).sum())
                rows[split] = f"{found} of {len(dataset.keys)} sequences covered"
        values = {"path": str(store.path), "models": names, **asdict(info), **rows}
        terminal.answer("cache", terminal.listing(str(store.path), rows), values)


def verify_caches(target: Path | Config, *, recompute: int) -> None:
    """Checks every shard, and with a configuration recomputes rows with its reference model.

    Args:
        target: A root of caches, one cache's folder, or a configuration.
        recompute: Number of random rows to recompute; needs a configuration.

    Raises:
        UserError: A shard is damaged or of another model (all such shards, one per line), or a recomputed row
            differs.
    """
    if recompute and not isinstance(target, Config):
        raise UserError("--recompute: needs the data and model of a configuration; give --config FILE")
    for store in _stores(target, strict=True):
        rows, shards = verify(store), len(store.shards())
        said = f"{store.path}: {rows} rows in {shards} shards, none damaged"
        terminal.answer("verified", said, {"path": str(store.path), "rows": rows, "shards": shards})
        if recompute and isinstance(target, Config):
            datasets = [*_datasets(target).values()]
            references = reference_logps(datasets, store, "dpo precompute-ref with the same configuration")
            model = reference_model(target.model, target.reference)
            with frozen_scorer(model, sharded=is_sharded(target.reference.sharding, model)) as scorer:
                seed = int.from_bytes(np.random.default_rng().bytes(4))  # other rows every time
                result = audit(scorer, datasets, references, store, num_rows=recompute, seed=seed)
            terminal.answer(
                "recomputed",
                f"{store.path}: {result.rows} rows recomputed, largest difference {result.largest:.2g} nats, "
                f"{result.share:.0%} of the tolerance for rounding",
                {"path": str(store.path), **asdict(result)},
            )


def prune_caches(target: Path | Config, others: Sequence[Config], *, dry_run: bool) -> None:
    """Joins small shards; with configurations also drops rows that none of them needs.

    Args:
        target: A root of caches or one cache's folder (all rows are kept), or a configuration.
        others: More configurations whose rows are kept; each must have the same reference model.
        dry_run: Only print what would be done.

    Raises:
        UserError: A cache is damaged or cannot be written, or belongs to another model than `target`'s.
    """
    wanted = None
    stores = _stores(target)
    if isinstance(target, Config):
        for other in others:
            if (found := _store_of(other)).path.resolve() != stores[0].path.resolve():
                raise UserError(
                    f"--and_config: its cache is {found.path}, not {stores[0].path}; prune it separately"
                )
        keys = [data.keys for config in (target, *others) for data in _datasets(config).values()]
        wanted = index_keys(np.concatenate(keys))[0]
    for store in stores:
        result = prune(store, wanted, dry_run=dry_run)
        terminal.answer(
            "pruned",
            f"{store.path}: {'would keep' if dry_run else 'kept'} {result.kept} of {result.rows} rows; "
            f"{len(result.replaced)} shards of {result.bytes} bytes {'would be' if dry_run else 'were'} "
            f"rewritten{'' if dry_run else f'; now {len(store.shards())} shards'}",
            {"path": str(store.path), "kept": result.kept, "rows": result.rows, "dry_run": dry_run},
        )


def _stores(target: Path | Config, *, strict: bool = False) -> list[ReferenceStore]:
    """The caches of a target. Unreadable caches under a root are skipped with a message, or an error if
    `strict`.
    """
    if isinstance(target, Config):
        distributed.start()
        store = _store_of(target)
        if not store.path.is_dir():
            nearest = store.nearest_other()
            raise UserError(
                f"{store.path}: no such cache yet{f' ({nearest})' if nearest else ''}; run precompute-ref"
            )
        return [store]
    if (target / IDENTITY_FILE).is_file():
        return [ReferenceStore.at(target)]
    found, unreadable = [], []
    for file in sorted(target.glob(f"*/{IDENTITY_FILE}")):
        try:
            found.append(ReferenceStore.at(file.parent))
        except UserError as error:
            unreadable.append(str(error))
    if unreadable and (strict or not found):
        raise UserError("; ".join(unreadable))
    if not found:
        raise UserError(
            f"{target}: no reference cache there; expected a folder with {IDENTITY_FILE}, or its parent"
        )
    for message in unreadable:
        print(f"skipped: {message}", file=sys.stderr)
    return found


def _store_of(config: Config) -> ReferenceStore:
    return reference_store(reference_model(config.model, config.reference), Path(config.reference.cache_dir))


def _datasets(config: Config) -> dict[str, TokenizedDataset]:
    train, test, _ = open_data(config.data, config.model, config.loss)
    return {split: data for split, data in (("train", train), ("test", test)) if data is not None}
