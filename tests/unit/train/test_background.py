"""Training goes on while a checkpoint is written, and keeps every promise about it."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from unit.train.checkpoints import FakeEngine, names, problem_of
from unit.train.runs import KilledError, Trained, changed

from dpo.config import Config
from dpo.errors import UserError
from dpo.files import leftovers_of
from dpo.tracking.run_folder import RunFolder
from dpo.train import disk_space, loop
from dpo.train import pending as pending_module
from dpo.train.checkpoint import Progress, begin_checkpoint, load_checkpoint
from dpo.train.disk_space import fits_memory, here
from dpo.train.pending import PendingCheckpoint


def begin(engine: Any, run_dir: Path, step: int) -> PendingCheckpoint:
    folder = RunFolder(run_dir)
    return begin_checkpoint(engine, Progress(step=step), folder, 9, {}, in_background=True)


def test_the_checkpoint_holds_the_state_when_it_was_begun_and_appears_when_it_is_finished(
    tmp_path: Path,
) -> None:
    engine = FakeEngine("then")
    engine.may_write.clear()
    pending = begin(engine, tmp_path, 4)
    random_state = torch.get_rng_state()
    engine.state = "now"
    torch.rand(3)
    assert not pending.written
    assert not (tmp_path / "checkpoints" / "step_00000004").exists()
    engine.may_write.set()
    folder = pending.finish()
    assert problem_of(folder) is None
    fresh: Any = FakeEngine()
    load_checkpoint(fresh, folder, folder)
    assert fresh.state == "then"
    assert torch.equal(torch.get_rng_state(), random_state)


def test_an_error_of_the_writer_is_the_same_as_without_one(tmp_path: Path) -> None:
    begin(FakeEngine("fine"), tmp_path, 2).finish()
    pending = begin(FakeEngine(fails=True), tmp_path, 4)
    pending._thread.join()
    assert pending.written
    with pytest.raises(UserError, match=r"could not be written \(rank 0: disk full; .* are free there\)"):
        pending.finish()
    assert names(tmp_path) == ["step_00000002"]


def test_training_does_not_wait_for_the_removal_of_old_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_remove, plain = threading.Event(), pending_module._remove

    def slowly(folders: list[Path]) -> None:
        may_remove.wait(60)
        plain(folders)

    begin(FakeEngine("old"), tmp_path, 2).finish()
    monkeypatch.setattr(pending_module, "_remove", slowly)
    folder, engine = RunFolder(tmp_path), FakeEngine("new")
    pending = begin_checkpoint(engine, Progress(step=4), folder, 1, {}, in_background=True)  # type: ignore[arg-type]
    assert pending.finish().name == "step_00000004"
    (left,) = folder.checkpoints.glob(".step_00000002.*.writing")  # as a kill would leave it
    assert names(tmp_path) == [left.name, "step_00000004"]
    assert left in leftovers_of(folder.checkpoint(2))
    may_remove.set()
    pending.settle()
    assert not left.exists()


def options(**more: Any) -> dict[str, Any]:
    return {"checkpoint_every": 2, "keep_last": 9, "checkpoint_async": True, **more}


def test_what_is_written_in_the_background_is_what_is_written_in_the_foreground(
    experiment: Config, run: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, plain = threading.Event(), torch.save

    def slowly(*arguments: Any, **named: Any) -> None:
        slow.wait(0.5)  # some steps are made meanwhile
        plain(*arguments, **named)

    before = run(changed(experiment, "foreground", **options(checkpoint_async=False)))
    monkeypatch.setattr(torch, "save", slowly)
    behind = run(changed(experiment, "background", **options()))
    assert behind.lines() == before.lines()
    states = [sorted((trained.folder / "checkpoints").glob("*/engine.pt")) for trained in (before, behind)]
    assert [file.parent.name for file in states[1]] == [f"step_{step:08d}" for step in (2, 4, 6)]
    for one, other in zip(*states, strict=True):
        assert same(torch.load(one, weights_only=True), torch.load(other, weights_only=True)), one.parent.name
        assert problem_of(other.parent) is None


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return bool(one == other)


def test_a_second_checkpoint_waits_for_the_first_and_the_end_for_both(
    experiment: Config, run: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    begin_plain, finish_plain = loop.begin_checkpoint, PendingCheckpoint.finish

    def begin_noted(engine: Any, progress: Progress, *rest: Any, **named: Any) -> PendingCheckpoint:
        events.append(f"begin {progress.step}")
        return begin_plain(engine, progress, *rest, **named)

    def finish_noted(self: PendingCheckpoint) -> Path:
        done = finish_plain(self)
        events.append(f"finish {int(done.name[-8:])}")
        return done

    monkeypatch.setattr(loop, "begin_checkpoint", begin_noted)
    monkeypatch.setattr(PendingCheckpoint, "finish", finish_noted)
    monkeypatch.setattr(PendingCheckpoint, "written", False)  # the writer is slower than training
    run(changed(experiment, "waits", **options()))
    assert events == [f"{what} {step}" for step in (2, 4, 6) for what in ("begin", "finish")]


def test_an_error_of_the_writer_ends_the_run_at_the_next_step(
    experiment: Config, run: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    monkeypatch.setattr(PendingCheckpoint, "written", property(lambda self: self._thread.join() is None))
    config = changed(experiment, "full", **options())
    with pytest.raises(UserError, match=r"a checkpoint could not be written \(rank 0: .*No space left"):
        run(config)
    recorded = (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()
    assert len(recorded) == 2


def test_a_run_that_fails_waits_for_its_thread_and_leaves_no_checkpoint(
    experiment: Config, run: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, plain = threading.Event(), torch.save
    monkeypatch.setattr(torch, "save", lambda *given, **named: (slow.wait(0.5), plain(*given, **named)))
    config = changed(experiment, "fails", **options(evaluate_every=1))
    with pytest.raises(KilledError):
        run(config, evaluation=float, die_at=3)
    assert "checkpoint" not in {thread.name for thread in threading.enumerate()}
    assert names(Path(config.run_dir)) == [".none_yet", ".step_00000002.writing"]
    assert (
        run(config, evaluation=float).lines()[-1]["step"] == 6
    )  # the same command starts over, and removes what was left
    assert names(Path(config.run_dir)) == [f"step_{step:08d}" for step in (2, 4, 6)]


def test_a_copy_is_made_where_it_takes_at_most_half_of_the_memory_that_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fits_memory(1)
    assert not fits_memory(2**60)
    monkeypatch.setattr(disk_space, "Path", lambda name: tmp_path / "nothing")  # not Linux
    assert not fits_memory(1)


def test_the_ranks_of_a_host_hold_their_part_of_a_sharded_state(monkeypatch: pytest.MonkeyPatch) -> None:
    assert here(800, sharded=True) == 800
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert here(800, sharded=True) == 400
    assert here(800, sharded=False) == 800
