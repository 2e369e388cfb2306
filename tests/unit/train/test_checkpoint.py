"""A checkpoint is complete and as it was written, or it does not exist."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dpo.errors import UserError
from dpo.train.checkpoint import (
    Progress,
    is_valid,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)


@dataclass
class FakeEngine:
    """Writes one number where the real one writes weights and optimizer state."""

    state: str = "start"
    kind: str = "one device"
    fails: bool = False

    def save(self, folder: Path) -> None:
        (folder / "deep").mkdir()
        (folder / "deep" / "state").write_text(self.state)
        if self.fails:
            raise OSError("disk full")

    def load(self, folder: Path) -> None:
        self.state = (folder / "deep" / "state").read_text()


def save(run_dir: Path, *steps: int, keep_last: int = 9) -> Path:
    for step in steps:
        engine: Any = FakeEngine(f"state {step}")
        folder = save_checkpoint(engine, Progress(step=step, num_tokens=10 * step), run_dir, keep_last)
    return folder


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_a_checkpoint_restores_engine_and_progress(tmp_path: Path) -> None:
    engine: Any = FakeEngine("weights")
    progress = Progress(step=7, num_tokens=123, best_loss=0.25)
    folder = save_checkpoint(engine, progress, tmp_path, 2)
    assert folder == tmp_path / "checkpoints" / "step_00000007"
    fresh: Any = FakeEngine()
    assert load_checkpoint(fresh, folder) == progress
    assert fresh.state == "weights"


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    save(tmp_path, 2, 4, 6, 10, keep_last=2)
    assert names(tmp_path) == ["step_00000006", "step_00000010"]


def test_the_newest_valid_one_is_found(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    newest = save(tmp_path, 2, 4, 100)
    assert newest_checkpoint(tmp_path) == newest


@pytest.mark.parametrize("name", ["deep/state", "progress.json"])
@pytest.mark.parametrize("damage", ["other", "cut", "gone"])
def test_a_damaged_one_is_passed_over(tmp_path: Path, name: str, damage: str) -> None:
    older, newest = save(tmp_path, 2), save(tmp_path, 4)
    file = newest / name
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:  # one byte differs and the size does not; or the last byte is missing
        file.write_bytes(content[:-1] + (bytes([content[-1] ^ 1]) if damage == "other" else b""))
    assert not is_valid(newest)
    assert newest_checkpoint(tmp_path) == older


@pytest.mark.parametrize("manifest", [None, "", "{", "[]", '{"files": []}', '{"files": {}}'])
def test_one_without_a_readable_manifest_does_not_exist(tmp_path: Path, manifest: str | None) -> None:
    older, newest = save(tmp_path, 2), save(tmp_path, 4)
    file = newest / "manifest.json"
    file.unlink() if manifest is None else file.write_text(manifest)
    assert newest_checkpoint(tmp_path) == older


def test_a_crash_while_writing_leaves_the_older_one_and_the_next_attempt_succeeds(tmp_path: Path) -> None:
    older = save(tmp_path, 2)
    failing: Any = FakeEngine(fails=True)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(failing, Progress(step=4), tmp_path, 2)
    assert newest_checkpoint(tmp_path) == older
    assert save(tmp_path, 4) == newest_checkpoint(tmp_path)
    assert names(tmp_path) == ["step_00000002", "step_00000004"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 2, 4)
    engine: Any = FakeEngine("written again")
    folder = save_checkpoint(engine, Progress(step=4), tmp_path, 2)
    assert is_valid(folder)
    assert (folder / "deep" / "state").read_text() == "written again"


def test_what_a_run_that_went_back_has_given_up_is_removed(tmp_path: Path) -> None:
    save(tmp_path, 2, 4, 6, keep_last=2)
    save(tmp_path, 3, keep_last=2)  # it went on from a copy of step 2, say
    assert names(tmp_path) == ["step_00000003"]
    save(tmp_path, 5, keep_last=2)
    assert names(tmp_path) == ["step_00000003", "step_00000005"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"world_size": 2}, r"written by 2 rank\(s\) with one device; this run has 1 with one device"),
        ({"engine": "DeepSpeed ZeRO-2"}, r"written by 1 rank\(s\) with DeepSpeed ZeRO-2; this run has 1"),
    ],
)
def test_another_world_or_engine_is_refused_before_anything_is_loaded(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    folder = save(tmp_path, 2)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | change))
    engine: Any = FakeEngine("untouched")
    with pytest.raises(UserError, match=said):
        load_checkpoint(engine, folder)
    assert engine.state == "untouched"


def test_a_copied_checkpoint_is_valid_where_it_lies(tmp_path: Path) -> None:
    folder = save(tmp_path, 2)
    assert is_valid(Path(shutil.copytree(folder, tmp_path / "elsewhere")))
