"""Numbers that the launcher names and the experiment owns."""

from pathlib import Path

import pytest
from rig import Rig, metrics, weights

INLINE = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_GRADIENT_CLIPPING": "0.01",
    "ACCELERATE_MIXED_PRECISION": "bf16",
}


@pytest.mark.fault(
    "the launcher names accumulation, clipping and precision",
    "the experiment's are used, to the last bit; the others are named",
)
def test_the_launchers_numbers_change_nothing(rig: Rig, whole: Path) -> None:
    ended = rig.run("inline", stage=None, variables=INLINE)
    assert set(ended.statuses) == {0}, ended.said[-3000:]
    for key in ("gradient_accumulation_steps: 4", "gradient_clipping: 0.01", "mixed_precision: bf16"):
        assert f"{key} is not used" in ended.said
    assert metrics(rig.folder / "inline") == metrics(whole)
    assert weights(rig.folder / "inline") == weights(whole)
