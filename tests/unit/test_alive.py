"""Signs of life: who gives them, and what the watchdog can read off them."""

from pathlib import Path

import pytest

from dpo import alive, terminal
from dpo.alive import life
from dpo.files import sha256_of


@pytest.fixture(autouse=True)
def long_ago() -> None:
    life.advanced_at = -1e9


def test_every_loop_with_a_bar_gives_signs_of_life() -> None:
    for number in terminal.progress(range(2), description="rows", unit="rows"):
        if number == 1:
            assert life.advanced_at > 0
    life.advanced_at = -1e9
    with terminal.bar(2, description="rows", unit="rows") as bar:
        bar.update(1)
    assert life.advanced_at > 0


def test_hashing_a_large_file_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[None] = []
    monkeypatch.setattr(alive, "advanced", lambda: seen.append(None))
    (tmp_path / "large").write_bytes(bytes((1 << 20) + 1))
    assert sha256_of(tmp_path / "large").startswith("2cb74edba754a81d121c9db6833704a8")
    assert len(seen) > 4


def test_a_step_ends_the_loading_and_is_counted() -> None:
    steps = life.steps
    alive.loading("loading the policy")
    assert (life.doing, life.loading, life.steps) == ("loading the policy", True, steps + 1)
    alive.step("step 7")
    assert (life.doing, life.loading, life.steps) == ("step 7", False, steps + 2)


def test_the_end_of_a_wait_is_a_sign_of_life_also_after_an_error() -> None:
    def fail() -> None:
        with alive.waiting():
            assert life.waits == 1
            assert life.advanced_at < 0
            raise RuntimeError("connection closed")

    with pytest.raises(RuntimeError):
        fail()
    assert life.waits == 0
    assert life.advanced_at > 0
