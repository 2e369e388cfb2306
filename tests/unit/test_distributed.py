"""One process that was not launched: the collectives give what a world of one gives."""

import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from dpo import distributed
from dpo.distributed import SharedCount, from_main, gather_objects, on_main, require_shared, sum_over_ranks
from dpo.errors import UserError


def test_alone_this_process_is_the_world() -> None:
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert not distributed.is_distributed()
    distributed.barrier()  # waits for nobody
    assert sum_over_ranks(np.array([1.0, 2.0])).tolist() == [1.0, 2.0]
    assert (gather_objects("mine"), from_main("mine")) == (["mine"], "mine")
    assert distributed.share_of([3, 1, 2]) == [3, 1, 2]


def test_the_main_ranks_result_is_given_to_all() -> None:
    assert on_main(lambda: {"a": [1, 2]}) == {"a": [1, 2]}
    assert on_main(lambda: None) is None


def test_an_error_that_is_the_users_passes_through_and_so_does_a_bug() -> None:
    def refuse() -> None:
        raise UserError("data.train: no such file")

    with pytest.raises(UserError, match=r"^data\.train: no such file$"):
        on_main(refuse)
    with pytest.raises(ZeroDivisionError):
        on_main(lambda: 1 // 0)


def test_another_rank_does_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    on_main(lambda: done.append("work"))
    assert done == []


def test_counts_add_up_each_for_itself() -> None:
    first, second = SharedCount("tokens"), SharedCount("tokens")
    assert [first.add(3), first.add(0), first.add(4)] == [3, 3, 7]
    assert second.add(1) == 1


def test_a_folder_that_all_see_is_made_and_left_empty(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "cache"
    for _ in range(2):
        require_shared(folder, "data.cache_dir")
        assert list(folder.iterdir()) == []


def test_a_place_that_cannot_be_written_is_refused_by_its_key(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("not a folder")
    for folder in (file, file / "below"):
        with pytest.raises(
            UserError, match=rf"^data\.cache_dir: cannot write to {folder} \(.*\); expected a folder"
        ):
            require_shared(folder, "data.cache_dir")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert file.read_text() == "not a folder"


def test_a_folder_that_a_rank_does_not_see_is_refused_with_its_host_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "SHARED_WAIT_SECONDS", 0.2)
    monkeypatch.setattr(Path, "is_file", lambda path: False)
    message = (
        rf"^data\.cache_dir: {tmp_path} is not shared: .* is not seen by rank 0 on {socket.gethostname()} \("
    )
    with pytest.raises(UserError, match=message):
        require_shared(tmp_path, "data.cache_dir")
    assert list(tmp_path.iterdir()) == []


def test_a_token_that_is_seen_late_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([False, False, True])
    monkeypatch.setattr(Path, "is_file", lambda path: next(looks))
    require_shared(tmp_path, "data.cache_dir")
    assert next(looks, "all used") == "all used"


@pytest.mark.parametrize(("backend", "destroyed"), [("nccl", 1), ("cpu:gloo,cuda:nccl", 1), ("gloo", 0)])
def test_groups_of_gpus_are_destroyed_at_the_end(
    backend: str, destroyed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append("destroyed"))
    distributed.leave()
    assert len(calls) == destroyed


def test_leaving_without_a_group_does_nothing() -> None:
    distributed.leave()


@pytest.mark.parametrize(
    ("listed", "devices", "said"),
    [("GPU 0: H100", None, True), ("GPU 0: H100", "", False), ("No devices were found", None, False)],
)
def test_gpus_that_torch_does_not_see_are_mentioned(
    listed: str,
    devices: str | None,
    said: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{listed}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if devices is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    distributed._warn_of_unseen_gpus.cache_clear()
    distributed._warn_of_unseen_gpus()
    distributed._warn_of_unseen_gpus.cache_clear()
    shown = capsys.readouterr()
    assert ("1 GPU(s)" in shown.err + shown.out) is said
