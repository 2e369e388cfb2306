"""Which checkpoint needs its universal form for which world. The conversion itself: tests/faults."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from dpo import distributed
from dpo.engine import reshard
from dpo.engine.reshard import needs_universal_form, universal_form
from dpo.errors import UserError
from dpo.tracking.run_folder import RunFolder
from dpo.train.manifest import Manifest, write_manifest


@pytest.fixture
def checkpoint(tmp_path: Path) -> Any:
    """Makes an empty checkpoint of an engine and a number of ranks."""

    def make(engine: str, world_size: int) -> Path:
        folder = tmp_path / "checkpoints" / "step_00000002"
        folder.mkdir(parents=True)
        manifest = Manifest(step=2, world_size=world_size, engine=engine, fingerprints={}, files={})
        write_manifest(manifest, folder, RunFolder(tmp_path))
        return folder

    return make


@pytest.mark.parametrize(
    ("wrote", "ranks", "kind", "expected"),
    [
        ("DeepSpeed ZeRO-2", 1, "DeepSpeed ZeRO-2", False),
        ("DeepSpeed ZeRO-2", 2, "DeepSpeed ZeRO-2", True),
        ("DeepSpeed ZeRO-3", 8, "DeepSpeed ZeRO-3", True),
        ("DeepSpeed ZeRO-1", 2, "DeepSpeed ZeRO-1", True),
        ("DeepSpeed ZeRO-0", 2, "DeepSpeed ZeRO-0", False),  # every rank has the whole state
        ("DDP", 2, "one device", False),
        ("one device", 1, "DDP", False),
        ("DDP", 2, "DDP", False),
    ],
)
def test_a_sharded_state_needs_it_in_another_world(
    checkpoint: Any, wrote: str, ranks: int, kind: str, expected: bool
) -> None:
    assert distributed.world_size() == 1
    assert needs_universal_form(Path("x"), wrote, ranks, kind) is expected


@pytest.mark.parametrize(
    ("wrote", "kind"),
    [
        ("DeepSpeed ZeRO-2", "DeepSpeed ZeRO-3"),
        ("DeepSpeed ZeRO-2", "one device"),
        ("DDP", "DeepSpeed ZeRO-0"),
    ],
)
def test_another_engine_is_refused_with_what_to_do(checkpoint: Any, wrote: str, kind: str) -> None:
    with pytest.raises(UserError, match=f"written with {wrote}.*{kind}"):
        needs_universal_form(Path("x"), wrote, 2, kind)


def test_what_the_converter_says_is_the_reason_and_nothing_is_left(
    checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(command: list[str], **options: Any) -> Any:
        return subprocess.CompletedProcess(
            command, 1, stdout="", stderr="Traceback\nAssertionError: no shards\n"
        )

    monkeypatch.setattr(reshard.subprocess, "run", fails)
    folder = checkpoint("DeepSpeed ZeRO-2", 2)
    problem = r"step_00000002: .* could not convert it for 1 rank\(s\) \(AssertionError: no shards\)"
    with pytest.raises(UserError, match=problem), universal_form(folder, tmp_path):
        pytest.fail("there is nothing to load")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]


def test_the_universal_form_is_gone_after_its_use(
    checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def converts(command: list[str], **options: Any) -> Any:
        assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & options["env"].keys()
        Path(command[command.index("--output_folder") + 1]).mkdir()
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    monkeypatch.setattr(reshard.subprocess, "run", converts)
    monkeypatch.setenv("RANK", "0")
    with universal_form(checkpoint("DeepSpeed ZeRO-2", 2), tmp_path) as universal:
        assert (universal / "engine").is_dir()
    assert not universal.exists()
