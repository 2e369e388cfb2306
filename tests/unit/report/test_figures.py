"""Figures: what they show, and that equal numbers give equal files."""

from pathlib import Path

import pytest
from nasty import figures, history

from dpo.evaluate.statistics import Interval
from dpo.report.figures import (
    LONGEST_RAW,
    Point,
    histogram_before_and_after,
    inline_svg,
    losses_and_margins,
    save_png,
    score_against_kl,
)

SUMMARY = {"kl/sequence": 2.0, "score/policy": 0.5, "score/reference": 0.1}
SUMMARY |= {f"{name}/{end}": value for name, value in SUMMARY.items() for end in ("low", "high")}


def test_a_point_comes_from_a_summary() -> None:
    assert Point.of(SUMMARY, "7") == Point(label="7", kl=Interval(2, 2, 2), score=Interval(0.5, 0.5, 0.5))
    assert Point.of_reference(SUMMARY) == Point(label="", kl=Interval(0, 0, 0), score=Interval(0.1, 0.1, 0.1))


def test_the_axes_of_score_against_kl_have_units_and_its_legend_names_curves_and_limit() -> None:
    limit = [Point.of_reference(SUMMARY), Point.of(SUMMARY)]
    (axes,) = score_against_kl({"beta 0.1": [Point.of(SUMMARY)]}, limit=limit).axes
    assert axes.get_xlabel() == "KL(policy || reference), nats per sequence"
    assert axes.get_ylabel() == "mean score"
    assert set(axes.get_legend_handles_labels()[1]) == {"limit of any policy", "beta 0.1"}
    assert axes.get_xlim()[0] <= 0


@pytest.mark.parametrize(("steps", "lines"), [(LONGEST_RAW, 1), (LONGEST_RAW + 1, 2)])
def test_a_long_curve_is_smoothed(steps: int, lines: int) -> None:
    loss, _ = losses_and_margins({"": history(steps)}).axes
    held_out = 1
    assert len(loss.get_lines()) == lines + held_out


def test_the_same_numbers_give_the_same_figure() -> None:
    first, second = (inline_svg(figures()[0].figure, "training") for _ in range(2))
    assert first == second


def test_distributions_without_spread_can_be_drawn() -> None:
    figure = histogram_before_and_after([1.0, 1.0], [1.0], title="t", unit="u", counted="c")
    assert inline_svg(figure, "a").startswith("<svg ")


def test_outliers_count_in_the_outermost_bins() -> None:
    values = [0.0] * 999 + [1e6]
    figure = histogram_before_and_after(values, values, title="t", unit="u", counted="c")
    counts = sum(patch.get_height() for patch in figure.axes[0].patches)
    assert counts == 2 * len(values)


def test_a_png_replaces_the_old_one_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_text("old")
    save_png(figures()[2].figure, file)
    assert file.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [file]
