"""Other trackers: named wrongly, missing, failing, and receiving what metrics.jsonl holds."""

from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from dpo.errors import UserError
from dpo.tracking import trackers
from dpo.tracking.monitor import Monitor
from dpo.tracking.run_folder import RunFolder
from dpo.tracking.trackers import check_trackers, open_trackers
from dpo.train.manifest import make_key


class Recorder(GeneralTracker):
    name = "recorder"
    requires_logging_directory = False
    made: list["Recorder"] = []  # noqa: RUF012

    def __init__(self, project: str, **options: Any) -> None:
        super().__init__()
        self.project, self.options = project, options
        self.settings: dict[str, Any] = {}
        self.logged: list[tuple[int | None, dict[str, Any]]] = []
        self.finished = False
        self.made.append(self)

    @property
    def tracker(self) -> "Recorder":
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings = values

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


class Unreachable(Recorder):
    def start(self) -> None:
        raise ConnectionError("no route to host")


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    Recorder.made.clear()
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "recorder", Recorder)
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "unreachable", Unreachable)
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: ["recorder", "unreachable"])


def test_a_tracker_receives_the_settings_and_every_line(tmp_path: Path) -> None:
    opened = open_trackers(["recorder"], tmp_path / "mine", {"loss.beta": 0.1}, None)
    with Monitor(RunFolder(tmp_path), num_steps=2, first_step=0, unit="pairs", trackers=opened) as monitor:
        monitor.record(1, {"train/loss": 0.5})
        monitor.record(2, {"train/loss": 0.25})
    (recorder,) = Recorder.made
    assert recorder.project == "dpo"
    assert recorder.settings == {"loss.beta": 0.1}
    assert recorder.logged == [(1, {"train/loss": 0.5}), (2, {"train/loss": 0.25})]
    assert recorder.finished


def test_wandb_goes_on_with_one_run_when_ours_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Recorder)
    folders = [RunFolder(tmp_path / name) for name in ("one", "other")]
    for folder in (folders[0], folders[0], folders[1]):
        folder.path.mkdir(exist_ok=True)
        assert folder.key.is_file() or folder.identity is None
        make_key(folder)
        open_trackers(["wandb"], folder.path, {}, folder.identity)
    first, again, other = (recorder.options for recorder in Recorder.made)
    assert first == again
    assert first["id"] != other["id"]
    assert first["resume"] == "allow"


def test_all_faulty_names_are_said_at_once() -> None:
    check_trackers([])
    check_trackers(["recorder"])
    with pytest.raises(UserError) as error:
        check_trackers(["wanbd", "tensorboard", "mlflow", "recorder"])
    wrong, always, missing = str(error.value).splitlines()
    assert wrong.startswith("train.trackers: wanbd; expected names of ")
    assert "wandb" in wrong
    assert "TensorBoard is always written" in always
    assert missing.startswith("train.trackers: mlflow is not installed")


def test_a_tracker_that_cannot_be_opened_ends_the_run_before_it_starts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unreachable could not be opened \(no route to host\)"):
        open_trackers(["unreachable"], tmp_path, {}, None)


def test_a_resumed_run_goes_on_without_a_tracker_that_cannot_be_opened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = open_trackers(["unreachable", "recorder"], tmp_path, {}, None, resumed=True)
    assert [type(tracker) for tracker in opened] == [Recorder]
    assert (
        capsys.readouterr().out.count("unreachable could not be opened and receives nothing: no route") == 1
    )
