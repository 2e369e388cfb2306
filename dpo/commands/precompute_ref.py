"""dpo precompute-ref."""

from pathlib import Path

from dpo import distributed, terminal
from dpo.commands.inputs import described, join_ranks, open_data
from dpo.config import Config
from dpo.loss.catalog import needs_reference, title_of
from dpo.reference.precompute import precompute
from dpo.reference.values import reference_store


def precompute_ref(config: Config) -> None:
    """Fills the reference cache with every sequence of the training and held-out data."""
    join_ranks()
    if not needs_reference(config.loss):
        used = title_of(config.loss)
        terminal.summary("precompute-ref", {"reference": f"not needed: {used}", "next": "dpo train"})
        return
    distributed.require_shared(Path(config.reference.cache_dir), "reference.cache_dir")
    train_data, test_data, _ = open_data(config.data, config.model)
    store = reference_store(config)
    result = precompute(config, [data for data in (train_data, test_data) if data is not None], store)
    rate = f", {result.misses / result.seconds:.1f} sequences/s" if result.misses else ""
    if result.misses and distributed.device().type == "cpu":
        rate += f" ({distributed.world_size()} rank(s) of one thread each: NPROC=N takes more cores)"
    nearest = store.nearest_other() if result.hits == 0 and distributed.is_main() else None
    terminal.summary(
        "precompute-ref",
        {
            "reference": f"{result.hits} sequences were there, {result.misses} computed{rate}",
            "cold": f"nothing was there before: {nearest}" if nearest else "",
            "cache": str(store.path),
            "data": f"{described('train', train_data)}\n{described('test', test_data)}",
            "next": "dpo train with the same configuration",
        },
    )
