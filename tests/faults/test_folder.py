"""Two trainings that want one run folder."""

from pathlib import Path

import pytest
from rig import SLOWLY, Rig, metrics, wait_for, weights


@pytest.mark.fault(
    "a second training, of other settings, in the folder of one that runs",
    "refused with status 2, naming machine and process; the first one ends as if alone",
)
def test_a_second_training_is_refused(rig: Rig, whole: Path) -> None:
    first = rig.start("shared", before=SLOWLY)
    wait_for((rig.folder / "shared" / "lock.json").is_file, 60, "the first has the folder")
    second = rig.start("shared", "--train.learning_rate", "1e-2")
    refused = second.end(60)
    assert set(refused.statuses) == {2}, refused.said[-3000:]
    assert "is in use by process " in refused.said
    ended = first.end(120)
    assert set(ended.statuses) == {0}, ended.said[-3000:]
    assert ended.status == 0
    assert metrics(rig.folder / "shared") == metrics(whole)
    assert weights(rig.folder / "shared") == weights(whole)
    assert not (rig.folder / "shared" / "lock.json").exists()
