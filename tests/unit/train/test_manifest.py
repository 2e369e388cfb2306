"""A checkpoint's manifest: signed by its run, and true of every file."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from unit.train.checkpoints import problem_of, save


def test_a_checkpoint_that_another_run_signed_is_refused(tmp_path: Path) -> None:
    ours, theirs = save(tmp_path / "ours", 2), save(tmp_path / "theirs", 2)
    shutil.rmtree(ours)
    shutil.copytree(theirs, ours)
    assert "was not written by the run of" in str(problem_of(ours))


def test_a_manifest_that_was_fitted_to_other_files_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 2)
    (folder / "deep" / "state").write_text("a pickle")
    manifest = json.loads((folder / "manifest.json").read_text())
    content = b"a pickle"
    manifest["files"]["deep/state"] = {"bytes": 8, "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "or was changed" in str(problem_of(folder))


def test_a_file_that_was_added_is_found(tmp_path: Path) -> None:
    folder = save(tmp_path, 2)
    added = "deep/mp_rank_01_model_states.pt"
    (folder / added).write_text("a pickle")
    assert problem_of(folder) == f"{added} is not in manifest.json: it was added later"


@pytest.mark.parametrize("key", ["", "00", "not hexadecimal", None])
def test_a_lost_or_damaged_key_is_said(tmp_path: Path, key: str | None) -> None:
    folder, file = save(tmp_path, 2), tmp_path / "checkpoint.key"
    assert file.stat().st_mode & 0o777 == 0o600
    file.unlink() if key is None else file.write_text(key)
    assert problem_of(folder) is not None


def test_a_whole_run_folder_may_be_moved(tmp_path: Path) -> None:
    save(tmp_path / "here", 2)
    moved = Path(shutil.move(tmp_path / "here", tmp_path / "there"))
    assert problem_of(moved / "checkpoints" / "step_00000002") is None
