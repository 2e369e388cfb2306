"""dpo precompute-ref: fills the reference cache. A signal stops it at once; what was computed is kept."""

from pathlib import Path

from dpo import distributed, terminal
from dpo.commands.amount import preference_plan, warn_of_amount
from dpo.commands.inputs import described, open_data, open_reference_model, quieten_libraries
from dpo.commands.settings import settings_of
from dpo.config import Config
from dpo.guards.guard import Guard
from dpo.loss.catalog import needs_reference, title_of
from dpo.model.files import check_token_ids
from dpo.reference.precompute import precompute
from dpo.reference.store import reference_store
from dpo.tracking.run_folder import RunFolder
from dpo.train.resume import Refuse, find_start

KEPT = "during precompute-ref: what was computed is kept; run the same command again"


def precompute_ref(config: Config) -> None:
    """Fills the reference cache with every sequence of the training and held-out data."""
    quieten_libraries()
    folder, stuck = RunFolder(Path(config.run_dir)), config.train.stuck_after_seconds
    with Guard(folder, "precompute-ref", stuck, at_once=KEPT, exclusive=False):
        _precompute_ref(config)


def _precompute_ref(config: Config) -> None:
    if not needs_reference(config.loss):
        used = title_of(config.loss)
        terminal.summary("precompute-ref", {"reference": f"not needed: {used}", "next": "dpo train"})
        return
    start = find_start(RunFolder(Path(config.run_dir)), settings_of(config), config.train, thorough=False)
    if isinstance(start, Refuse):  # said before the work, which other runs can use
        terminal.warning(f"after this, dpo train would not start: {start.reason}")
    cache_dir = Path(config.reference.cache_dir)
    distributed.require_shared(cache_dir, "reference.cache_dir")
    train_data, test_data, _ = open_data(config.data, config.model, config.loss)
    datasets = [data for data in (train_data, test_data) if data is not None]
    num_steps = preference_plan(train_data, config.train).num_steps
    warn_of_amount(num_steps, config.model, config.train)
    model = open_reference_model(config)
    for data in datasets:
        check_token_ids(model, data.largest_id, "reference.model")
    store = reference_store(model, cache_dir)
    result = precompute(model, config.reference, datasets, store)
    rate = f", {result.misses / result.seconds:.1f} sequences/s" if result.misses else ""
    if result.misses and distributed.device().type == "cpu":
        rate += f" ({distributed.world_size()} rank(s) with one thread each: NPROC=N uses more cores)"
    nearest = store.nearest_other() if result.hits == 0 and distributed.is_main() else None
    terminal.summary(
        "precompute-ref",
        {
            "reference": f"{result.hits} sequences were cached, {result.misses} computed{rate}",
            "cold": f"no sequence was cached; {nearest}" if nearest else "",
            "cache": str(store.path),
            "data": f"{described('train', train_data)}\n{described('test', test_data)}",
            "next": "dpo train with the same configuration",
        },
    )
