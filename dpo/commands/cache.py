"""The actions of `dpo cache`: what is in a reference cache, is it whole, and can it be smaller."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dpo import distributed
from dpo.commands.inputs import open_data
from dpo.config import Config
from dpo.data.dataset import TokenizedDataset
from dpo.engine.frozen import frozen_scorer, is_sharded
from dpo.errors import UserError
from dpo.reference.audit import audit
from dpo.reference.identity import reference_model
from dpo.reference.prune import cache_info, prune, verify
from dpo.reference.store import IDENTITY_FILE, ReferenceStore
from dpo.reference.table import index_keys
from dpo.reference.values import reference_logps, reference_store


def show_info(target: Path | Config) -> None:
    """Prints identity, rows, bytes and shards of caches; with a configuration also how much of its data is
    there.

    Args:
        target: A root, one cache's folder, or a configuration.
    """
    for store in _stores(target):
        info = cache_info(store)
        identity = store.identity
        print(store.path)
        print(f"  identity      {identity.digest}")
        for kind in ("weights", "adapter", "code"):
            for name, digest in getattr(identity, kind).items():
                print(f"  {kind:<13} {name} sha256 {digest[:16]}...")
        print(f"  model         {identity.config.get('model_type', 'unknown')}, {identity.dtype}")
        each = f", {info.bytes / info.rows:.1f} bytes a row" if info.rows else ""
        print(f"  rows          {info.rows}, {info.rows_with_tokens} of them with log-probs of tokens{each}")
        print(f"  shards        {info.shards}, {info.bytes} bytes, {info.copies} copies of rows", end="")
        print(f", {info.unfinished} unfinished files of killed processes" if info.unfinished else "")
        if isinstance(target, Config):
            table = store.load()
            for split, dataset in _datasets(target).items():
                found = int((table.index.find(dataset.keys) >= 0).sum())
                print(f"  {split:<13} {found} of {len(dataset.keys)} sequences covered")


def verify_caches(target: Path | Config, *, recompute: int) -> None:
    """Checks every shard, and with a configuration recomputes rows with its reference model.

    Args:
        target: A root, one cache's folder, or a configuration.
        recompute: Random rows to recompute; needs a configuration.

    Raises:
        UserError: Something is damaged, foreign or different; all of it, one a line.
    """
    if recompute and not isinstance(target, Config):
        raise UserError("--recompute: token ids and model come from a configuration; give --config FILE")
    for store in _stores(target, strict=True):
        print(f"{store.path}: {verify(store)} rows in {len(store.shards())} shards, all whole", flush=True)
        if recompute and isinstance(target, Config):
            datasets = [*_datasets(target).values()]
            references = reference_logps(datasets, store, "dpo precompute-ref with the same configuration")
            with frozen_scorer(
                reference_model(target),
                sharded=is_sharded(target.reference.sharding, reference_model(target)),
            ) as scorer:
                seed = int.from_bytes(np.random.default_rng().bytes(4))  # other rows every time
                result = audit(scorer, datasets, references, store, num_rows=recompute, seed=seed)
            print(
                f"{store.path}: {result.rows} rows recomputed, largest difference {result.largest:.2g} nats, "
                f"{result.share:.0%} of what rounding may do"
            )


def prune_caches(target: Path | Config, others: Sequence[Config], *, dry_run: bool) -> None:
    """Joins small shards; with configurations also drops rows that none of them needs.

    Args:
        target: A root or one cache's folder (all rows stay), or a configuration.
        others: More configurations whose rows stay; each must have the same reference model.
        dry_run: Only say what would be done.
    """
    wanted = None
    stores = _stores(target)
    if isinstance(target, Config):
        for other in others:
            if (found := reference_store(other)).path.resolve() != stores[0].path.resolve():
                raise UserError(
                    f"--and_config: its cache is {found.path}, not {stores[0].path}; prune that one apart"
                )
        keys = [data.keys for config in (target, *others) for data in _datasets(config).values()]
        wanted = index_keys(np.concatenate(keys))[0]
    for store in stores:
        result = prune(store, wanted, dry_run=dry_run)
        print(
            f"{store.path}: {'would keep' if dry_run else 'kept'} {result.kept} of {result.rows} rows; "
            f"{len(result.replaced)} shards of {result.bytes} bytes {'would be' if dry_run else 'were'} "
            f"rewritten{'' if dry_run else f'; now {len(store.shards())} shards'}"
        )


def _stores(target: Path | Config, *, strict: bool = False) -> list[ReferenceStore]:
    """What is meant. Under a root an unreadable one is left out aloud, or an error if `strict`."""
    if isinstance(target, Config):
        distributed.start()
        store = reference_store(target)
        if not store.path.is_dir():
            nearest = store.nearest_other()
            raise UserError(
                f"{store.path}: no such cache yet{f' ({nearest})' if nearest else ''}; precompute-ref makes "
                "it"
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
            f"{target}: no reference cache there; expected a folder with {IDENTITY_FILE}, or above one"
        )
    for said in unreadable:
        print(f"left out: {said}", file=sys.stderr)
    return found


def _datasets(config: Config) -> dict[str, TokenizedDataset]:
    train, test, _ = open_data(config.data, config.model)
    return {split: data for split, data in (("train", train), ("test", test)) if data is not None}
