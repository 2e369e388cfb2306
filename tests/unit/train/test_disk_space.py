"""The estimate is that of the files that are really written, and is compared with the disk before a start."""

from collections import namedtuple
from pathlib import Path

import pytest
import torch

from dpo.config import ModelConfig, OptimizationConfig
from dpo.data.trees import sequence_batch
from dpo.engine import world
from dpo.engine.engine import Engine
from dpo.errors import UserError
from dpo.model.load import load_model
from dpo.tracking.run_folder import RunFolder
from dpo.train.checkpoint import Progress, save_checkpoint
from dpo.train.disk_space import checkpoint_bytes, require_space

Usage = namedtuple("Usage", "total used free")
ONE = 16 * 1000  # weights, masters and two moments of 1,000 parameters


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
def test_the_estimate_is_the_size_of_a_checkpoint(tiny_model: Path, tmp_path: Path, optimizer: str) -> None:
    options = OptimizationConfig(optimizer=optimizer)  # type: ignore[arg-type]
    model = ModelConfig(name_or_path=str(tiny_model), dtype="float32")
    engine = Engine(world.start(model), load_model(model), model, options)
    ids = torch.arange(8, dtype=torch.int32).numpy()
    engine.accumulate(-engine.score(sequence_batch([(ids, ids)])).sum(), last=True)
    engine.update(0.01)
    folder = save_checkpoint(engine, Progress(step=1, num_tokens=8), RunFolder(tmp_path), 1, {})
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    parameters = sum(p.numel() for p in load_model(model).parameters())
    expected = checkpoint_bytes(parameters, torch.float32, options, sharded=False)
    assert expected == pytest.approx(written, rel=0.25)  # a tiny model's names and headers weigh something


def test_deepspeed_keeps_masters_beside_the_weights() -> None:
    options = OptimizationConfig()
    assert checkpoint_bytes(1000, torch.bfloat16, options, sharded=True) == 1000 * (2 + 4 + 8)
    assert checkpoint_bytes(1000, torch.bfloat16, options, sharded=False) == 1000 * (4 + 8)


def space(folder: Path, monkeypatch: pytest.MonkeyPatch, free: int, **options: object) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda place: Usage(0, 0, free))
    config = OptimizationConfig(**options)  # type: ignore[arg-type]
    one = checkpoint_bytes(1000, torch.float32, config, sharded=True)
    require_space(folder, one, 4000, config, 10)


def test_room_for_one_more_than_are_kept_and_the_model_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space(tmp_path, monkeypatch, 3 * ONE + 4000, keep_last=2, checkpoint_every=5)
    with pytest.raises(
        UserError, match=r"run_dir: .* needs about .* \(3 checkpoints .* lower train.keep_last"
    ):
        space(tmp_path, monkeypatch, 3 * ONE + 3999, keep_last=2, checkpoint_every=5)


def test_a_second_model_is_counted_where_the_best_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space(tmp_path, monkeypatch, 2 * ONE + 8000, keep_last=1, checkpoint_every=5, keep_best=True)
    with pytest.raises(UserError):
        space(tmp_path, monkeypatch, 2 * ONE + 7999, keep_last=1, checkpoint_every=5, keep_best=True)


def test_without_checkpoints_only_the_model_needs_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space(tmp_path, monkeypatch, 4000, checkpoint_every=0)


def test_what_the_run_has_written_is_room_that_it_may_write_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "state").write_bytes(bytes(2 * ONE))
    space(tmp_path, monkeypatch, 4000, keep_last=1, checkpoint_every=5)


def test_the_disk_of_a_folder_that_is_not_there_yet_is_asked(tmp_path: Path) -> None:
    options = OptimizationConfig(checkpoint_every=5)
    require_space(tmp_path / "a" / "b", ONE, 4000, options, 10)
    with pytest.raises(UserError):
        require_space(tmp_path / "a" / "b", ONE, 10**18, options, 10)
