"""A damaged or modified checkpoint is never loaded; the run uses the previous one, or is refused."""

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rig import KILL, Rig, at_step, metrics, weights

NEWEST = "step_00000006"


@pytest.fixture(scope="module")
def killed(rig: Rig) -> Path:
    """A run that was killed before step 7, with checkpoints of steps 2, 4 and 6."""
    rig.run("to_damage", before=at_step(7, KILL, 0, 1))
    return rig.folder / "to_damage"


def _shard(folder: Path) -> Path:
    return folder / "engine" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"


def truncated(folder: Path) -> str:
    file = _shard(folder)
    file.write_bytes(file.read_bytes()[:-1000])
    return _shard(folder).name


def flipped(folder: Path) -> str:
    content = bytearray(_shard(folder).read_bytes())
    content[len(content) // 2] ^= 1
    _shard(folder).write_bytes(content)
    return _shard(folder).name


def missing(folder: Path) -> str:
    _shard(folder).unlink()
    return _shard(folder).name


def no_manifest(folder: Path) -> str:
    (folder / "manifest.json").unlink()
    return ""  # a folder without a manifest is ignored without a message


def empty_latest(folder: Path) -> str:
    (folder.parent / "latest").write_text("")  # DeepSpeed's pointer, which is neither written nor read
    (folder / "manifest.json").unlink()
    return ""


@pytest.mark.fault(
    "newest checkpoint damaged: truncated shard, flipped byte, missing file, no manifest, empty `latest`",
    "reported; the previous checkpoint is used, and the final result is the same",
)
@pytest.mark.parametrize("damage", [truncated, flipped, missing, no_manifest, empty_latest])
def test_a_damaged_checkpoint_is_skipped(
    rig: Rig, whole: Path, killed: Path, damage: Callable[[Path], str]
) -> None:
    run_dir = Path(shutil.copytree(killed, rig.folder / damage.__name__))
    named = damage(run_dir / "checkpoints" / NEWEST)
    ended = rig.run(run_dir.name)
    assert set(ended.statuses) == {0}, ended.output[-3000:]
    assert "after step 4" in ended.output
    assert named in ended.output
    assert metrics(run_dir) == metrics(whole)
    assert weights(run_dir) == weights(whole)


@pytest.mark.fault(
    "every checkpoint damaged",
    "status 2, with a reason for each; nothing is overwritten",
)
def test_a_run_without_a_valid_checkpoint_is_refused(rig: Rig, killed: Path) -> None:
    run_dir = Path(shutil.copytree(killed, rig.folder / "all_damaged"))
    for folder in (run_dir / "checkpoints").iterdir():
        flipped(folder)
    before = (run_dir / "metrics.jsonl").read_bytes()
    ended = rig.run(run_dir.name)
    assert set(ended.statuses) == {2}
    assert ended.output.count("is not used") >= 3
    assert (run_dir / "metrics.jsonl").read_bytes() == before


class Bomb:
    """Creates the file `mark` when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.mark,)


@pytest.mark.fault(
    "a pickle planted in a checkpoint, with its digest in the manifest",
    "never opened: the manifest is signed",
)
def test_a_pickle_in_a_checkpoint_is_never_opened(rig: Rig, killed: Path, tmp_path: Path) -> None:
    run_dir, mark = Path(shutil.copytree(killed, rig.folder / "planted")), tmp_path / "ran"
    bomb = pickle.dumps(Bomb(mark))
    for folder in (run_dir / "checkpoints").iterdir():
        name = "engine/mp_rank_00_model_states.pt"
        (folder / name).write_bytes(bomb)
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"][name] = {"bytes": len(bomb), "sha256": hashlib.sha256(bomb).hexdigest()}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    ended = rig.run(run_dir.name)
    assert set(ended.statuses) == {2}
    assert "manifest.json" in ended.output
    assert not mark.exists()


@pytest.mark.fault(
    "a pickle added to a checkpoint or to the cache, or passed as data",
    "never opened",
)
def test_a_pickle_elsewhere_is_never_opened(rig: Rig, killed: Path, tmp_path: Path) -> None:
    run_dir, mark = Path(shutil.copytree(killed, rig.folder / "added")), tmp_path / "ran"
    bomb = pickle.dumps(Bomb(mark))
    added = "engine/zero_pp_rank_2_mp_rank_00_optim_states.pt"
    for folder in (run_dir / "checkpoints").iterdir():
        (folder / added).write_bytes(bomb)
    assert added in rig.run(run_dir.name).output
    cache = Path(shutil.copytree(rig.folder / "reference", tmp_path / "reference"))
    (identity,) = cache.glob("*/identity.json")
    (identity.parent / "part-0.pt").write_bytes(bomb)
    (identity.parent / "part-0000.parquet").write_bytes(bomb)
    ended = rig.run("bad_cache", "--reference.cache_dir", str(cache), world_size=1, stage=None)
    assert ended.statuses == [2], ended.output[-2000:]
    (tmp_path / "pairs.jsonl").write_bytes(bomb)
    for name in ("pairs.jsonl", "pairs.parquet"):
        (tmp_path / name).write_bytes(bomb)
        ended = rig.run("bad_data", "--data.train", str(tmp_path / name), world_size=1, stage=None)
        assert ended.statuses == [2], ended.output[-2000:]
    assert not mark.exists()
