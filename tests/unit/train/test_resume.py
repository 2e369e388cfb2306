"""Where a run starts or resumes, and every folder it refuses."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpo.cli.validate import problems
from dpo.commands.settings import settings_of
from dpo.config import Config, resolved
from dpo.errors import UserError
from dpo.tracking.run_folder import RunFolder
from dpo.train import resume
from dpo.train.checkpoint import Progress, prepare_checkpoints, save_checkpoint
from dpo.train.resume import Fresh, Refuse, Resume, Start, check_fingerprints

Make = Callable[..., Config]


class FakeEngine:
    kind = "one device"

    def save(self, folder: Path, *, copied: bool) -> Callable[[], list[Path]]:
        (folder / "state").write_text("state")
        return lambda: [folder / "state"]


def look(config: Config) -> Start:
    return resume.find_start(RunFolder(Path(config.run_dir)), settings_of(config), config.train)


def find_start(config: Config) -> Path | None:
    """The checkpoint to resume from; UserError with the reason of a refusal, as the commands raise it."""
    start = look(config)
    if isinstance(start, Refuse):
        raise UserError(start.reason)
    return start.checkpoint if isinstance(start, Resume) else None


@pytest.fixture
def config(make_config: Make) -> Config:
    return make_config("data.jsonl")


def changed(config: Config, key: str, value: Any) -> Config:
    section, _, name = key.partition(".")
    if not name:
        return replace(config, **{section: value})
    return replace(config, **{section: replace(getattr(config, section), **{name: value})})


def begin(config: Config, *, steps: int, checkpoints: tuple[int, ...] = ()) -> Path:
    """A run that has recorded `steps` steps and written these checkpoints."""
    run_dir = Path(config.run_dir)
    RunFolder(run_dir).claim(resolved(config))
    lines = [json.dumps({"step": step, "train/loss": 0.5}) + "\n" for step in range(steps + 1)]
    (run_dir / "metrics.jsonl").write_text("".join(lines))
    engine: Any = FakeEngine()
    for step in checkpoints:
        save_checkpoint(engine, Progress(step=step), RunFolder(run_dir), 9, {"data.train": "abc"})
    return run_dir


def test_a_folder_that_is_not_there_or_empty_starts_afresh(config: Config) -> None:
    assert find_start(config) is None
    Path(config.run_dir).mkdir()
    assert find_start(config) is None
    assert find_start(changed(config, "train.resume", "never")) is None


def test_a_run_resumes_from_its_newest_checkpoint(config: Config) -> None:
    run_dir = begin(config, steps=5, checkpoints=(2, 4))
    assert find_start(config) == run_dir / "checkpoints" / "step_00000004"
    (run_dir / "checkpoints" / "step_00000004" / "state").write_text("damaged")
    assert find_start(config) == run_dir / "checkpoints" / "step_00000002"


def test_a_run_that_recorded_no_step_starts_again(config: Config) -> None:
    begin(config, steps=0)  # only the evaluation before the first step
    assert find_start(config) is None
    assert find_start(changed(config, "train.resume", "never")) is None


def test_a_step_of_which_half_a_line_was_written_is_not_recorded(config: Config) -> None:
    run_dir = begin(config, steps=0)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "train/lo')
    assert find_start(config) is None


def test_damaged_metrics_are_refused_only_before_the_checkpoint(config: Config) -> None:
    run_dir = begin(config, steps=5, checkpoints=(3,))
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_text("".join([*lines[:5], "\0\0\n", *lines[5:]]))
    assert find_start(config) == run_dir / "checkpoints" / "step_00000003"
    (run_dir / "metrics.jsonl").write_text("".join([*lines[:2], "\0\0\n", *lines[2:]]))
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 3 "):
        find_start(config)


def test_a_run_that_was_refused_before_it_began_starts(config: Config) -> None:
    run_dir = Path(config.run_dir)
    run_dir.mkdir()
    (run_dir / "exit.json").write_text("{}")  # the command line wrote why
    assert find_start(config) is None


def test_steps_without_a_valid_checkpoint_never_start_over(config: Config) -> None:
    begin(config, steps=3)
    with pytest.raises(UserError, match="records 3 steps"):
        find_start(config)


def test_a_run_that_died_before_its_first_checkpoint_starts_again_and_says_so(config: Config) -> None:
    config = changed(config, "train.checkpoint_every", 4)
    begin(config, steps=3)
    start = look(config)
    assert isinstance(start, Fresh)
    (note,) = start.notes
    assert "ended after step 3, before its first checkpoint: it starts again" in note
    with pytest.raises(UserError, match=r"other settings.*loss\.beta"):
        find_start(changed(config, "loss.beta", 0.7))


def test_a_run_that_never_finished_a_checkpoint_starts_again(config: Config) -> None:
    config = changed(config, "train.checkpoint_every", 2)
    run_dir = begin(config, steps=2)  # killed while it wrote its first
    folder = RunFolder(run_dir)
    prepare_checkpoints(folder, resumed=False)
    (folder.checkpoints / ".step_00000002.writing").mkdir()
    assert isinstance(look(config), Fresh)
    engine: Any = FakeEngine()
    save_checkpoint(engine, Progress(step=2), folder, 9, {})
    assert isinstance(look(config), Resume)
    shutil.rmtree(folder.checkpoint(2))  # lost
    with pytest.raises(UserError, match="no valid checkpoint"):
        find_start(config)


def test_steps_after_another_runs_checkpoint_never_start_from_scratch(config: Config) -> None:
    config = changed(config, "train.checkpoint_every", 2)
    begin(config, steps=3)
    prepare_checkpoints(RunFolder(Path(config.run_dir)), resumed=True)
    with pytest.raises(UserError, match="no valid checkpoint"):
        find_start(config)


def test_what_may_have_been_finished_never_starts_again(config: Config) -> None:
    run_dir = begin(changed(config, "train.checkpoint_every", 4), steps=4)  # its checkpoint is lost
    with pytest.raises(UserError, match="no valid checkpoint"):
        find_start(config)
    run_dir = begin(changed(config, "train.checkpoint_every", 0), steps=3)  # it wrote none on purpose
    with pytest.raises(UserError, match="no valid checkpoint"):
        find_start(changed(config, "train.checkpoint_every", 4))
    begin(changed(config, "train.checkpoint_every", 4), steps=3)
    (run_dir / "model").mkdir()  # it came to its end
    (run_dir.parent / "run_2").mkdir()
    with pytest.raises(UserError, match=r"run holds a finished run of 3 steps.*--run_dir \S+run_3 is free"):
        find_start(changed(config, "train.checkpoint_every", 4))


def test_never_refuses_a_folder_with_steps(config: Config) -> None:
    begin(config, steps=3, checkpoints=(2,))
    with pytest.raises(UserError, match=r"3 steps, and train\.resume is never"):
        find_start(changed(config, "train.resume", "never"))


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_folder_that_holds_something_else_is_refused(config: Config, resume: str) -> None:
    Path(config.run_dir).mkdir()
    (Path(config.run_dir) / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"run_dir: .* is not empty"):
        find_start(changed(config, "train.resume", resume))


def test_a_file_is_refused(config: Config) -> None:
    Path(config.run_dir).write_text("")
    with pytest.raises(UserError, match=r"run_dir: .* is a file"):
        find_start(config)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("train.learning_rate", 0.5, r"train\.learning_rate: 1e-06 -> 0\.5"),
        ("train.seed", 7, r"train\.seed: 0 -> 7"),
        ("train.adam_betas", (0.5, 0.9), r"train\.adam_betas: \[0\.9, 0\.999\] -> \[0\.5, 0\.9\]"),
        ("data.max_length", 32, r"data\.max_length: None -> 32"),
        ("data.train", "other.jsonl", r"data\.train: data\.jsonl -> other\.jsonl"),
        ("loss.beta", 0.2, r"loss\.beta: 0\.1 -> 0\.2"),
        ("model.dtype", "bfloat16", r"model\.dtype: float32 -> bfloat16"),
    ],
)
def test_a_setting_that_changes_the_run_is_refused_with_the_difference(
    config: Config, key: str, value: Any, said: str
) -> None:
    run_dir = begin(config, steps=3, checkpoints=(2,))
    other = changed(config, key, value)
    with pytest.raises(UserError, match=f"other settings.*: {said}"):
        find_start(other)
    with pytest.raises(UserError, match=said):
        find_start(changed(other, "train.resume", str(run_dir / "checkpoints" / "step_00000002")))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.max_tokens_per_micro_batch", 64),
        ("train.checkpoint_every", 1),
        ("train.evaluate_every", 1),
        ("train.keep_last", 1),
        ("model.gradient_checkpointing", True),
        ("reference.cache_dir", "elsewhere"),
        ("data.cache_dir", "elsewhere"),
        ("evaluate.num_prompts", 3),
    ],
)
def test_a_setting_that_changes_no_weight_may_change(config: Config, key: str, value: Any) -> None:
    begin(config, steps=3, checkpoints=(2,))
    assert find_start(changed(config, key, value)) is not None


def test_a_named_checkpoint_is_taken_and_a_damaged_one_refused(config: Config, tmp_path: Path) -> None:
    run_dir = begin(config, steps=5, checkpoints=(2, 4))
    named = run_dir / "checkpoints" / "step_00000002"
    assert find_start(changed(config, "train.resume", str(named))) == named
    elsewhere = changed(config, "run_dir", str(tmp_path / "new"))  # a run that branches off
    assert find_start(changed(elsewhere, "train.resume", str(named))) == named
    (named / "state").write_text("damaged")
    with pytest.raises(UserError, match=r"train\.resume: .* cannot be used: state has"):
        find_start(changed(config, "train.resume", str(named)))


def test_named_keys_may_change_when_asked_for(config: Config) -> None:
    begin(config, steps=3, checkpoints=(2,))
    other = changed(changed(config, "loss.beta", 0.2), "train.seed", 7)
    with pytest.raises(UserError, match=r"--train\.resume_allow loss\.beta,train\.seed"):
        find_start(other)
    with pytest.raises(UserError, match=r"train\.seed: 0 -> 7\. Put") as refused:
        find_start(changed(other, "train.resume_allow", "loss.beta"))
    assert "loss.beta: 0.1" not in str(refused.value)
    assert find_start(changed(other, "train.resume_allow", "loss.beta,train.seed")) is not None


def test_a_key_that_an_older_version_did_not_know_counts_as_its_default(config: Config) -> None:
    run_dir = begin(config, steps=3, checkpoints=(2,))
    settings = resolved(config)
    del settings["data"]["too_long"], settings["train"]["adam_betas"]
    RunFolder(run_dir).claim(settings)
    assert find_start(config) is not None
    with pytest.raises(UserError, match=r"data\.too_long: truncate -> drop"):
        find_start(changed(config, "data.too_long", "drop"))


def test_a_key_that_does_not_exist_cannot_be_allowed(config: Config) -> None:
    (problem,) = problems(changed(config, "train.resume_allow", "loss.beta,loss.bet"))
    assert problem.startswith("train.resume_allow: loss.bet; expected")


def test_a_branch_is_compared_with_the_run_it_leaves(config: Config, tmp_path: Path) -> None:
    run_dir = begin(config, steps=3, checkpoints=(2,))
    named = str(run_dir / "checkpoints" / "step_00000002")
    branch = changed(changed(config, "run_dir", str(tmp_path / "branch")), "train.resume", named)
    assert find_start(branch) == Path(named)
    with pytest.raises(UserError, match=r"loss\.beta: 0\.1 -> 0\.2"):
        find_start(changed(branch, "loss.beta", 0.2))


def test_other_content_under_the_same_name_is_refused(config: Config) -> None:
    (start,) = (begin(config, steps=3, checkpoints=(2,)) / "checkpoints").iterdir()
    check_fingerprints(start, {"data.train": "abc"}, config.train)
    with pytest.raises(
        UserError, match=r"data\.train: content abc -> xyz.*--train\.resume_allow data\.train"
    ):
        check_fingerprints(start, {"data.train": "xyz"}, config.train)
    with pytest.raises(UserError, match=r"data\.test: content none -> abc"):
        check_fingerprints(start, {"data.train": "abc", "data.test": "abc"}, config.train)
    allowed = changed(config, "train.resume_allow", "data.train")
    check_fingerprints(start, {"data.train": "xyz"}, allowed.train)


def test_checkpoints_without_recorded_metrics_are_still_resumed(config: Config) -> None:
    run_dir = begin(config, steps=3, checkpoints=(2,))
    (run_dir / "metrics.jsonl").unlink()
    assert find_start(config) == run_dir / "checkpoints" / "step_00000002"


def test_why_a_newer_checkpoint_is_not_used_is_said(config: Config) -> None:
    run_dir = begin(config, steps=5, checkpoints=(2, 4))
    newest = run_dir / "checkpoints" / "step_00000004"
    (newest / "state").write_text("STATE")
    start = look(config)
    assert isinstance(start, Resume)
    assert start.checkpoint.name == "step_00000002"
    assert list(start.notes) == [f"checkpoint {newest} is not used: state is damaged: its digest differs"]
    (newest.with_name("step_00000002") / "state").unlink()
    with pytest.raises(UserError, match=r"no valid checkpoint[^\n]*\n.*state is damaged"):
        find_start(config)
