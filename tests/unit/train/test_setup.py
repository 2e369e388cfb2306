"""What is settled before a model is loaded: a state that another number of ranks cannot read."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from dpo.config import OptimizationConfig
from dpo.engine.optimizer import OPTIMIZERS
from dpo.errors import UserError
from dpo.train import setup


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop", "lion"])
def test_only_adamws_sharded_state_goes_on_with_other_ranks(
    monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    written = SimpleNamespace(engine="DeepSpeed ZeRO-2", world_size=2)
    monkeypatch.setattr(setup, "read_manifest", lambda checkpoint: written)
    monkeypatch.setattr(setup, "check_fingerprints", lambda *arguments: None)
    monkeypatch.setattr(setup, "kind_here", lambda: "DeepSpeed ZeRO-2")
    options = OptimizationConfig(optimizer=optimizer)  # type: ignore[arg-type]
    checkpoint = Path("runs/x/checkpoints/step_00000004")
    if OPTIMIZERS[optimizer].reshards:
        assert setup.needs_resharding(checkpoint, {}, options)
    else:
        with pytest.raises(UserError, match=rf"written by 2 rank.*adamw alone.*{optimizer}: start it with"):
            setup.needs_resharding(checkpoint, {}, options)
    written.world_size = 1  # as here
    assert not setup.needs_resharding(checkpoint, {}, options)
