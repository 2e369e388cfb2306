"""A checkpoint is complete and as it was written, or it does not exist."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from unit.train.checkpoints import FakeEngine, names, newest_checkpoint, problem_of, save

from dpo.errors import UserError
from dpo.tracking.run_folder import RunFolder
from dpo.train.checkpoint import Progress, load_checkpoint, save_checkpoint, set_aside_newer
from dpo.train.manifest import complete_checkpoints


def test_a_checkpoint_restores_engine_and_progress(tmp_path: Path) -> None:
    engine: Any = FakeEngine("weights")
    progress = Progress(step=7, num_tokens=123, best_loss=0.25)
    folder = save_checkpoint(engine, progress, RunFolder(tmp_path), 2, {})
    assert folder == tmp_path / "checkpoints" / "step_00000007"
    fresh: Any = FakeEngine()
    assert load_checkpoint(fresh, folder, folder) == progress
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
    assert problem_of(newest) is not None
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
    with pytest.raises(UserError, match=r"could not be written \(rank 0: disk full; .* are free there\)"):
        save_checkpoint(failing, Progress(step=4), RunFolder(tmp_path), 2, {})
    assert names(tmp_path) == ["step_00000002"]
    assert newest_checkpoint(tmp_path) == older
    assert save(tmp_path, 4) == newest_checkpoint(tmp_path)
    assert names(tmp_path) == ["step_00000002", "step_00000004"]


@pytest.mark.parametrize("size", [10, 1_000_000])
def test_a_disk_that_is_full_is_named_where_torch_hides_it(size: int, tmp_path: Path) -> None:
    class Full(FakeEngine):
        def save(self, folder: Path, *, copied: bool) -> Any:
            return lambda: torch.save(torch.zeros(size), "/dev/full")

    engine: Any = Full()
    with pytest.raises(UserError, match=r"rank 0: the disk did not take all bytes, torch does not say why"):
        save_checkpoint(engine, Progress(step=2), RunFolder(tmp_path), 2, {})


def test_the_systems_own_words_are_kept(tmp_path: Path) -> None:
    def write() -> None:
        try:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), "state.pt")
        finally:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    class Stale(FakeEngine):
        def save(self, folder: Path, *, copied: bool) -> Any:
            return write

    engine: Any = Stale()
    with pytest.raises(UserError, match=r"rank 0: \[Errno 116\] Stale file handle: 'state.pt'; "):
        save_checkpoint(engine, Progress(step=2), RunFolder(tmp_path), 2, {})


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 2, 4)
    engine: Any = FakeEngine("written again")
    folder = save_checkpoint(engine, Progress(step=4), RunFolder(tmp_path), 2, {})
    assert problem_of(folder) is None
    assert (folder / "deep" / "state").read_text() == "written again"


def test_what_a_run_that_went_back_has_given_up_is_removed(tmp_path: Path) -> None:
    save(tmp_path, 2, 4, 6, keep_last=2)
    save(tmp_path, 3, keep_last=2)  # it went on from a copy of step 2, say
    assert names(tmp_path) == ["step_00000003"]
    save(tmp_path, 5, keep_last=2)
    assert names(tmp_path) == ["step_00000003", "step_00000005"]


def test_a_crash_between_two_renames_loses_nothing(tmp_path: Path) -> None:
    folder = save(tmp_path, 4)
    folder.rename(folder.with_name(f".{folder.name}.replaced"))  # and the new one was not there yet
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert problem_of(found) is None
    assert save(tmp_path, 4) == newest_checkpoint(tmp_path)
    assert names(tmp_path) == ["step_00000004"]


def test_what_a_killed_process_was_writing_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / ".step_00000003.writing").mkdir(parents=True)
    assert newest_checkpoint(tmp_path) is None
    save(tmp_path, 4)
    assert names(tmp_path) == ["step_00000004"]


def test_the_random_state_of_a_rank_comes_back(tmp_path: Path) -> None:
    folder = save(tmp_path, 2)
    expected = torch.rand(3)
    torch.rand(17)
    engine: Any = FakeEngine()
    load_checkpoint(engine, folder, folder)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(("umask", "mode"), [(0o002, 0o664), (0o077, 0o600)])
def test_files_have_the_permissions_of_the_umask_and_the_key_is_private(
    tmp_path: Path, umask: int, mode: int
) -> None:
    before = os.umask(umask)
    try:
        folder = save(tmp_path, 2)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()} == {mode}
    assert (tmp_path / "checkpoint.key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content", ["", "abc", "not hex"])
def test_a_damaged_key_is_made_anew_before_it_signs_anything(tmp_path: Path, content: str) -> None:
    (tmp_path / "checkpoint.key").write_text(content)  # killed, or the machine lost power
    assert problem_of(save(tmp_path, 2)) is None


def test_checkpoints_may_be_a_link_to_a_big_disk(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "checkpoints").symlink_to(tmp_path / "disk" / "checkpoints")
    RunFolder(run_dir).claim({})
    save(run_dir, 2, 4, keep_last=1)
    assert (run_dir / "checkpoints").is_symlink()
    assert newest_checkpoint(run_dir) == run_dir / "checkpoints" / "step_00000004"
    assert [path.name for path in (tmp_path / "disk" / "checkpoints").iterdir()] == ["step_00000004"]


def test_newer_checkpoints_are_kept_aside_and_can_be_resumed_from_by_name(tmp_path: Path) -> None:
    save(tmp_path, 2, 4, 6, 8)
    kept = set_aside_newer(RunFolder(tmp_path), 4)
    assert [path.name for path in kept] == ["aside_step_00000006", "aside_step_00000008"]
    assert [path.name for path in complete_checkpoints(RunFolder(tmp_path))] == [
        "step_00000002",
        "step_00000004",
    ]
    assert [problem_of(path) for path in kept] == [None, None]
    save(tmp_path, 6, keep_last=1)
    assert names(tmp_path) == ["aside_step_00000006", "aside_step_00000008", "step_00000006"]
    assert set_aside_newer(RunFolder(tmp_path), 6) == []
