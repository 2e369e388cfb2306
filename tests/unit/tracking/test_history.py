"""metrics.jsonl after a crash: damage at its end is passed over, elsewhere it is one clear error."""

from pathlib import Path

import pytest

from dpo.errors import UserError
from dpo.tracking.history import curve, last_step, load_history, read_history
from dpo.tracking.run_folder import RunFolder

INTACT = b'{"step": 1, "train/loss": 0.5}\n{"step": 2, "train/loss": 0.4}\n'


def folder(tmp_path: Path, content: bytes | None) -> RunFolder:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_bytes(content)
    return RunFolder(tmp_path)


@pytest.mark.parametrize("content", [None, b""])
def test_no_file_and_an_empty_one_have_no_steps(tmp_path: Path, content: bytes | None) -> None:
    assert load_history(folder(tmp_path, content)).lines == []
    assert last_step(folder(tmp_path, content)) == 0


@pytest.mark.parametrize(
    ("tail", "damaged"),
    [
        (b"", 0),
        (b'{"step": 3, "train/lo', 0),  # killed while it wrote
        (b"\0" * 4096, 1),  # power loss: the size was written, the content was not
        (b"\0\0\n", 1),
        (b'{"step": 3, "tr\n\0\0\n', 2),
        (b"\xff\xfe\n", 1),
        (b'["step"]\n{}\n', 2),
    ],
)
def test_damage_at_the_end_is_passed_over_and_counted(tmp_path: Path, tail: bytes, damaged: int) -> None:
    history = load_history(folder(tmp_path, INTACT + tail))
    assert "".join(history.texts).encode() == INTACT
    assert history.num_damaged == damaged
    assert last_step(RunFolder(tmp_path)) == 2


@pytest.mark.parametrize("torn", [b'{"step": 3, "tr\n', b"\0\0\0\n", b"[]\n", b"\n"])
def test_damage_before_an_intact_line_names_the_line(tmp_path: Path, torn: bytes) -> None:
    run = folder(tmp_path, INTACT + torn + b'{"step": 4}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 3 ") as refused:
        read_history(run)
    assert len(str(refused.value).splitlines()) == 1
    assert last_step(run) == 4
    upto = load_history(run, until=2)  # a run resumes after step 2: the rest is made again
    assert ("".join(upto.texts).encode(), upto.num_damaged) == (INTACT, 1)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    for read in (load_history, last_step):
        with pytest.raises(UserError, match=r"metrics\.jsonl"):
            read(RunFolder(tmp_path))


def test_a_curve_has_the_lines_that_have_it() -> None:
    history = [{"step": 1, "a": 0.5}, {"step": 2}, {"step": 3, "a": 0.25}]
    assert curve(history, "a") == ([1, 3], [0.5, 0.25])
