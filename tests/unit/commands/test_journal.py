import json
import sys
from pathlib import Path

import pytest

from dpo.commands.journal import Journal, start
from dpo.errors import RunFailed, UserError


def _writes(product: Path, calls: Path) -> list[str]:
    code = f"open({str(calls)!r}, 'a').write('x'); open({str(product)!r}, 'w').close()"
    return [sys.executable, "-c", code]


def test_a_command_runs_once_for_the_same_words_settings_and_product(tmp_path: Path) -> None:
    product, calls = tmp_path / "product", tmp_path / "calls"
    journal, command = Journal(file=tmp_path / "done.json"), _writes(tmp_path / "product", tmp_path / "calls")
    assert journal.once("make", command, product, {"a": 1})
    assert not journal.once("make", command, product, {"a": 1})
    assert journal.once("make", command, product, {"a": 2})
    product.unlink()
    assert journal.once("make", command, product, {"a": 2})
    assert calls.read_text() == "xxx"
    assert list(json.loads((tmp_path / "done.json").read_text())) == [str(product)]


def test_what_failed_or_left_nothing_is_not_done(tmp_path: Path) -> None:
    journal = Journal(file=tmp_path / "done.json")
    with pytest.raises(RunFailed, match=r"left no .*product"):
        journal.once("make", [sys.executable, "-c", ""], tmp_path / "product")
    with pytest.raises(UserError, match="make exited with status 2"):
        journal.once("make", [sys.executable, "-c", "raise SystemExit(2)"], tmp_path / "product")
    assert not journal.file.exists()


def test_a_failed_command_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="make exited with status 7"):
        start("make", [sys.executable, "-c", "raise SystemExit(7)"])
