"""Atomic files and folders: the old content or the new one, whatever happens in between."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from dpo import files
from dpo.files import atomic_folder, publish_folder, read_lines, sha256_of, write_file
from dpo.processes import this_process


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    write_file(tmp_path / "a.txt", "old")
    write_file(tmp_path / "a.txt", "new ä")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "new ä"
    assert names(tmp_path) == ["a.txt"]


def test_a_file_that_cannot_be_written_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_file(tmp_path / "a.txt", "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as refused:
        write_file(tmp_path / "a.txt", "new")
    assert refused.value.filename == str(tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_file_and_folder_are_flushed_before_and_after_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: happened.append("fsync"))
    plain = Path.replace
    monkeypatch.setattr(
        Path, "replace", lambda self, target: happened.append("rename") or plain(self, target)
    )
    write_file(tmp_path / "a.txt", "x")
    assert happened == ["fsync", "rename", "fsync"]


@pytest.mark.parametrize(
    ("umask", "mode", "expected"), [(0o022, 0o666, 0o644), (0o077, 0o666, 0o600), (0o002, 0o600, 0o600)]
)
def test_the_umask_decides_on_permissions(tmp_path: Path, umask: int, mode: int, expected: int) -> None:
    before = os.umask(umask)
    try:
        write_file(tmp_path / "a.txt", "x", mode=mode)
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == expected


def test_a_linked_file_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "a.txt").symlink_to(tmp_path / "disk" / "a.txt")
    write_file(tmp_path / "a.txt", "x")
    assert (tmp_path / "a.txt").is_symlink()
    assert (tmp_path / "disk" / "a.txt").read_text() == "x"


def test_a_folder_takes_its_place_when_it_is_complete(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").touch()
    with atomic_folder(tmp_path / "model") as building:
        (building / "new").write_text("x")
        assert names(tmp_path / "model") == ["old"]
    assert names(tmp_path / "model") == ["new"]
    assert names(tmp_path) == ["model"]


def test_after_an_error_the_old_folder_is_there_and_the_new_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()

    def fail() -> None:
        with atomic_folder(tmp_path / "model") as building:
            (building / "new").touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == []


def test_a_folder_behind_a_link_is_replaced_behind_it(tmp_path: Path) -> None:
    (tmp_path / "disk" / "model").mkdir(parents=True)
    (tmp_path / "model").symlink_to(tmp_path / "disk" / "model")
    with atomic_folder(tmp_path / "model") as building:
        (building / "new").touch()
    assert (tmp_path / "model").is_symlink()
    assert names(tmp_path / "disk" / "model") == ["new"]
    assert names(tmp_path / "disk") == ["model"]


def test_of_two_that_write_the_same_folder_the_first_stays(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "data", replace=False) as slow:
        (slow / "by").write_text("slow")
        with atomic_folder(tmp_path / "data", replace=False) as fast:
            (fast / "by").write_text("fast")
    assert (tmp_path / "data" / "by").read_text() == "fast"
    assert names(tmp_path) == ["data"]


def test_a_crash_while_a_folder_is_replaced_leaves_the_old_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("data", "building"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()

    class Killed(BaseException):
        pass

    plain = Path.rename

    def once(self: Path, target: Path) -> Path:
        if self.name == "building":
            raise Killed
        return plain(self, target)

    monkeypatch.setattr(Path, "rename", once)
    with pytest.raises(Killed):
        publish_folder(tmp_path / "building", tmp_path / "data")
    assert names(tmp_path) == [".data.replaced", "building"]


def test_names_differ_each_time_and_are_hidden(tmp_path: Path) -> None:
    first, second = (files.temporary_of(tmp_path / "a.txt") for _ in range(2))
    assert first != second
    assert first.name.startswith(".a.txt.")
    assert first.name.endswith(".writing")


def test_a_digest_is_that_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()


def test_only_what_dead_processes_left_half_written_is_removed_from_a_shared_folder(tmp_path: Path) -> None:
    dead = replace(this_process(), began="1").tag()
    elsewhere = replace(this_process(), place="another machine", began="1").tag()
    old = tmp_path / f".old.0123456789ab.{elsewhere}.writing"
    names = {
        "living": files.temporary_of(tmp_path / "tokens"),
        "dead file": tmp_path / f".part-1.parquet.0123456789ab.{dead}.writing",
        "dead folder": tmp_path / f".tokens.0123456789ab.{dead}.writing",
        "elsewhere": tmp_path / f".tokens.0123456789ab.{elsewhere}.writing",
        "of an older version": tmp_path / ".tokens.0123456789ab.writing",
        "old": old,
        "complete": tmp_path / "tokens",
    }
    for name, path in names.items():
        path.mkdir() if name == "dead folder" else path.touch()
    os.utime(old, (0, 0))
    files.remove_abandoned(tmp_path)
    left = {name for name, path in names.items() if path.exists()}
    assert left == {"living", "elsewhere", "of an older version", "complete"}
    files.remove_abandoned(tmp_path / "not there")


def test_a_line_ends_at_a_line_feed_alone(tmp_path: Path) -> None:
    rows = [{"text": f"before {sign} after"} for sign in ("\u2028", "\u2029", "\x85", "\x1c", "\r", "\n")]
    file = tmp_path / "samples.jsonl"
    write_file(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    assert read_lines(file) == rows
