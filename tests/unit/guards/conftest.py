"""The store of two ranks of which only one exists, and a watchdog that looks often."""

from typing import Any

import pytest
import torch.distributed as dist

from dpo import alive, distributed
from dpo.guards import hearts, watchdog
from dpo.guards.hearts import PREFIX


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hearts, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(hearts, "GONE_AFTER_SECONDS", 0.4)
    monkeypatch.setattr(hearts, "SILENT_AFTER_SECONDS", 0.4)
    monkeypatch.setattr(watchdog, "GRACE_SECONDS", 0.3)
    alive.life.steps = 0  # other tests of this process have made some


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The store of rank 0, this process, and of a rank 1 that does not exist."""
    store = dist.HashStore()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(distributed, "is_distributed", lambda: True)
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    return dist.PrefixStore(PREFIX, store)
