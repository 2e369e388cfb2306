"""Estimates of speed: a table by size, and steps that are bound by the host."""

import pytest

from dpo.planning.speed import LAUNCH_SECONDS, MFU_BY_PARAMETERS, expected_mfu, launch_note


def test_the_share_is_the_tables_between_its_entries_and_beyond_them() -> None:
    for size, share in MFU_BY_PARAMETERS.items():
        assert expected_mfu(round(size)) == pytest.approx(share, abs=1e-4)
    assert expected_mfu(10_000_000) == 0.19
    assert 0.19 < expected_mfu(400_000_000) < 0.32
    assert expected_mfu(70_000_000_000) == 0.33


def test_a_step_that_takes_longer_to_launch_than_to_compute_is_noted() -> None:
    assert launch_note(1000, 1e12, useful_flops=1e14, tokens=8) is None  # 10 ms against 6
    note = launch_note(1000, 1e11, useful_flops=1e14, tokens=1024)
    assert note is not None
    assert note.startswith("launch-bound")
    assert f"{1000 * LAUNCH_SECONDS * 1e3:.1f} ms" in note
    assert "1.0 ms" in note
