"""Steps that are not finite: skipped, counted, and the end of the run where there are too many."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from unit.train.runs import STEPS, Trained, changed

from dpo.commands.settings import settings_of
from dpo.config import Config
from dpo.data.dataset import TokenizedDataset
from dpo.errors import RunFailed
from dpo.tracking.run_folder import RunFolder
from dpo.train.resume import Resume, find_start


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
def test_a_step_whose_loss_is_not_finite_changes_nothing_and_is_counted(
    experiment: Config,
    run: Trained,
    spoil: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    value: float,
    optimizer: str,
) -> None:
    config = changed(experiment, "spoiled", optimizer=optimizer, checkpoint_every=1, keep_last=9)
    spoil({3}, value)
    trained = run(config)
    at = {line["step"]: line for line in trained.lines()}
    assert at[3]["train/skipped_steps"] == 1
    assert "train/grad_norm" not in at[3]
    assert "train/skipped_steps" not in at[4]
    assert "NaN" not in (trained.folder / "metrics.jsonl").read_text()
    said = capsys.readouterr()
    assert "step 3 is skipped, weights unchanged: the loss is not finite on rank 0" in said.out + said.err
    names = sorted(path.name for path in (trained.folder / "checkpoints").iterdir())
    assert names == [f"step_{number:08d}" for number in (1, 2, 4, 5, 6)]  # none of a skipped step
    assert all(bool(weight.isfinite().all()) for weight in trained.weights.values())


def test_a_skipped_step_leaves_weights_and_optimizer_as_they_were(
    experiment: Config, run: Trained, spoil: Callable[..., None]
) -> None:
    """A run that skips its last step ends with the weights of one that is a step shorter."""
    shorter = run(changed(experiment, "shorter", max_steps=STEPS - 1))
    spoil({STEPS})
    longer = run(changed(experiment, "longer"))
    for name, weight in shorter.weights.items():
        assert torch.equal(longer.weights[name], weight), name


def test_too_many_in_a_row_stop_the_run_with_its_last_good_checkpoint_intact(
    experiment: Config, run: Trained, spoil: Callable[..., None]
) -> None:
    config = changed(experiment, "doomed", max_skipped_steps=2, checkpoint_every=1, keep_last=1)
    spoil({2, 4, 5, 6})
    with pytest.raises(RunFailed, match=r"3 steps in a row, up to step 6.*max_skipped_steps: 2"):
        run(config)
    start = find_start(RunFolder(Path(config.run_dir)), settings_of(config), config.train)
    assert isinstance(start, Resume)
    assert start.checkpoint.name == "step_00000003"


def test_a_reference_that_is_not_finite_stops_the_run(
    experiment: Config, run: Trained, open_data: Callable[[Config], TokenizedDataset]
) -> None:
    reference = np.full(len(open_data(experiment).keys), np.nan)
    with pytest.raises(RunFailed, match=r"1 steps in a row, up to step 1.*loss is not finite on rank 0"):
        run(changed(experiment, "nan", max_skipped_steps=0), reference=reference)
