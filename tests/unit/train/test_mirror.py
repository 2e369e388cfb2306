"""The copy of a run folder behind a URL: what it holds, what it refuses, and law 5 after a lost disk."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from unit.train.checkpoints import save
from unit.train.runs import KilledError, Trained, changed

from dpo.config import Config
from dpo.errors import UserError
from dpo.tracking.run_folder import RunFolder
from dpo.train.mirror import Mirror

URL = "memory://bucket/run"


@pytest.fixture
def store() -> Iterator[Any]:
    found = fsspec.filesystem("memory")
    yield found
    found.rm("/bucket", recursive=True)


def mirrored(folder: RunFolder) -> None:
    mirror = Mirror(URL, folder)
    mirror.send()
    mirror.wait()


def names(store: Any) -> list[str]:
    return sorted(path.removeprefix("/bucket/run/") for path in store.find("/bucket/run"))


def test_a_run_on_a_lost_disk_goes_on_from_its_copy(
    run: Trained, experiment: Config, store: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"checkpoint_every": 2, "evaluate_every": 1, "keep_last": 1}
    whole = run(changed(experiment, "whole", **options), evaluation=float)
    config = changed(experiment, "lost", mirror=URL, **options)
    with pytest.raises(KilledError):
        run(config, evaluation=float, die_at=5)
    shutil.rmtree(config.run_dir)
    resumed = run(config, evaluation=float)
    assert "resuming after step 4" in capsys.readouterr().out
    assert resumed.lines() == whole.lines()
    for name, weight in whole.weights.items():
        assert torch.equal(resumed.weights[name], weight), name


def test_the_copy_holds_what_the_folder_holds(tmp_path: Path, store: Any) -> None:
    folder = RunFolder(tmp_path / "run")
    save(folder.path, 1, 2)
    (folder.path / ".hidden").touch()
    folder.lock.touch()
    folder.history.write_text("line\n")
    mirrored(folder)
    step = ["deep/state", "manifest.json", "progress.json", "rng/rank_00000.safetensors"]
    both = [f"checkpoints/step_0000000{number}/{name}" for number in (1, 2) for name in step]
    assert names(store) == ["checkpoint.key", *both, "metrics.jsonl"]
    folder.history.write_text("line\nanother\n")
    save(folder.path, 3, keep_last=1)
    mirrored(folder)
    assert {name.split("/")[1] for name in names(store) if "/" in name} == {"step_00000003"}
    assert store.cat_file("/bucket/run/metrics.jsonl") == b"line\nanother\n"


def test_a_manifest_comes_last(tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, sent = RunFolder(tmp_path / "run"), list[str]()
    save(folder.path, 1)
    monkeypatch.setattr(type(store), "put_file", lambda self, source, target: sent.append(target))
    mirrored(folder)
    assert sent[-1] == "/bucket/run/checkpoints/step_00000001/manifest.json"


def test_a_store_that_fails_costs_a_warning_and_is_tried_again(
    tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path / "run")
    save(folder.path, 1)
    mirror = Mirror(URL, folder)

    def fails(*arguments: Any) -> None:
        raise PermissionError("no access to bucket")

    with monkeypatch.context() as patched:
        patched.setattr(type(store), "put_file", fails)
        mirror.send()
        mirror.wait()
    assert "not up to date: PermissionError: no access to bucket" in capsys.readouterr().out
    mirror.send()
    mirror.wait()
    assert "checkpoints/step_00000001/manifest.json" in names(store)


def test_a_damaged_copy_is_not_used_and_the_one_before_is(
    tmp_path: Path, store: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = RunFolder(tmp_path / "first"), RunFolder(tmp_path / "second")
    save(first.path, 1, 2)
    mirrored(first)
    store.pipe_file("/bucket/run/checkpoints/step_00000002/deep/state", b"stale 2")
    Mirror(URL, second).restore()
    assert [path.name for path in second.checkpoints.iterdir()] == ["step_00000001"]
    assert "step_00000002" in capsys.readouterr().out
    assert second.key.stat().st_mode & 0o777 == 0o600


def test_a_copy_without_a_valid_checkpoint_is_refused(tmp_path: Path, store: Any) -> None:
    save(tmp_path / "first", 1)
    mirrored(RunFolder(tmp_path / "first"))
    store.pipe_file("/bucket/run/checkpoints/step_00000001/deep/state", b"stale 1")
    with pytest.raises(UserError, match="has no valid checkpoint: choose another URL"):
        Mirror(URL, RunFolder(tmp_path / "second")).restore()


def test_a_copy_of_another_run_is_refused(tmp_path: Path, store: Any) -> None:
    save(tmp_path / "first", 1)
    mirrored(RunFolder(tmp_path / "first"))
    save(tmp_path / "second", 5)
    for refused in (
        Mirror(URL, RunFolder(tmp_path / "second")).check,
        Mirror(URL, RunFolder(tmp_path / "second")).restore,
    ):
        with pytest.raises(
            UserError, match=f"{URL} is the copy of another run than .*second; choose another URL"
        ):
            refused()


def test_a_newer_checkpoint_on_the_disk_stays(tmp_path: Path, store: Any) -> None:
    folder = RunFolder(tmp_path / "run")
    save(folder.path, 1)
    mirrored(folder)
    save(folder.path, 2)
    folder.history.write_text("newer\n")
    Mirror(URL, folder).restore()
    assert folder.history.read_text() == "newer\n"
    assert len(list(folder.checkpoints.glob("step_*"))) == 2


@pytest.mark.parametrize(
    ("url", "said"),
    [("nosuch://bucket", "Protocol not known: nosuch"), ("memory://", None)],
    ids=["protocol", "root"],
)
def test_a_url_that_nothing_speaks(url: str, said: str | None, tmp_path: Path, store: Any) -> None:
    store.touch("/bucket/other")
    if said is None:
        Mirror(url, RunFolder(tmp_path)).check()
        return
    with pytest.raises(UserError, match=f"train.mirror: {url}: {said}"):
        Mirror(url, RunFolder(tmp_path))


def test_a_store_that_cannot_be_read(tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store.touch("/bucket/other")

    def fails(*arguments: Any, **keywords: Any) -> Callable[..., None]:
        raise PermissionError("no credentials")

    monkeypatch.setattr(type(store), "glob", fails)
    with pytest.raises(
        UserError, match=r"cannot be read \(PermissionError: no credentials\); log in to that"
    ):
        Mirror(URL, RunFolder(tmp_path)).restore()
