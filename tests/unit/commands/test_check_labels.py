"""`dpo check` on data with labels: some rows of it, or all with --exact."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dpo.cli.main import run


@pytest.fixture
def keys(tiny_model: Path, tmp_path: Path) -> list[str]:
    values = {
        "run_dir": tmp_path / "run",
        "model.name_or_path": tiny_model,
        "model.dtype": "float32",
        "data.train": tmp_path / "data.jsonl",
        "data.cache_dir": tmp_path / "tokenized",
    }
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


@pytest.mark.parametrize("exact", [[], ["--exact"]])
def test_a_loss_of_pairs_is_refused_for_labels(
    keys: list[str], write_jsonl: Callable[..., str], capsys: pytest.CaptureFixture[str], exact: list[str]
) -> None:
    write_jsonl([{"prompt": f"{n} the", "completion": f" {n}", "label": n % 2 == 0} for n in range(6)])
    assert run(["check", *exact, *keys, "--loss.type", "kto"]) == 0
    capsys.readouterr()
    assert run(["check", *exact, *keys]) == 2
    assert "loss.type: sigmoid; it needs pairs, and data.train has" in capsys.readouterr().err


def test_labels_that_are_all_the_same_are_refused(
    keys: list[str], write_jsonl: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl([{"prompt": f"{n} the", "completion": f" {n}", "label": True} for n in range(6)])
    assert run(["check", "--exact", *keys, "--loss.type", "kto"]) == 2
    assert "data.train: all 6 labels are true; expected desirable and" in capsys.readouterr().err
