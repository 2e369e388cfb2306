"""Figures of reports and comparisons: pure functions of numbers, without matplotlib's global state.

A figure is saved as PNG for Markdown, and as SVG inside a page, where its text and axes take the page's
colour so that it can be read in light and in dark.
"""

import io
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dpo.evaluate.statistics import Interval
from dpo.tracking.history import Line, curve

REFERENCE, POLICY = "#8a8f98", "#e0662f"  # also told apart without colour: dashed or hatched, and solid
CHOSEN, REJECTED = "#2b8cbe", "#d6604d"
PALETTE = ("#e0662f", "#2b8cbe", "#4d9a4d", "#9467bd", "#c2a12b", "#d64d8a", "#17a3a3", "#8c6d4f")
INK = "#010203"
"""The colour of text and axes, which a page replaces by its own."""
LONGEST_RAW = 100
"""Steps up to which a curve is drawn as it is; a longer one is averaged, and drawn faintly behind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Captioned:
    """A figure as the reports show it."""

    name: str
    """Of its file, without ending."""
    title: str
    caption: str
    """What is drawn and how to read it."""
    figure: Figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One model between score and KL."""

    label: str
    """Written beside the point; may be empty."""
    kl: Interval
    """KL(policy || reference), nats a sequence."""
    score: Interval


def losses_and_margins(runs: Mapping[str, Sequence[Line]]) -> Figure:
    """Loss and reward margin over optimizer steps, in training and on held-out data.

    Args:
        runs: Label -> history; one run needs no label.
    """
    with _style():
        figure = Figure(figsize=(10, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for index, (label, history) in enumerate(runs.items()):
            colour, prefix = PALETTE[index % len(PALETTE)], f"{label}: " if label else ""
            _curve(left, history, "train/loss", f"{prefix}training", colour)
            _dots(left, history, "eval/loss", f"{prefix}held-out", colour)
            _curve(right, history, "train/rewards/margins", f"{prefix}training", colour)
            _dots(right, history, "eval/rewards/margins", f"{prefix}held-out", colour)
        _finish(left, "Loss", "optimizer step", "a pair")
        _finish(right, "Reward margin", "optimizer step", "chosen - rejected, with beta")
        return figure


def rewards_over_steps(history: Sequence[Line]) -> Figure:
    """Implicit rewards of chosen and rejected completions over optimizer steps."""
    with _style():
        figure = Figure(figsize=(6.5, 3.4), layout="constrained")
        axes = figure.subplots()
        for name, colour in (("chosen", CHOSEN), ("rejected", REJECTED)):
            _curve(axes, history, f"train/rewards/{name}", f"{name}, training", colour)
            _dots(axes, history, f"eval/rewards/{name}", f"{name}, held-out", colour)
        axes.axhline(0, color=INK, linewidth=0.6, alpha=0.5)
        _finish(axes, "Rewards", "optimizer step", "implicit reward, with beta")
        return figure


def histogram_before_and_after(
    reference: npt.ArrayLike, policy: npt.ArrayLike, *, title: str, unit: str, counted: str
) -> Figure:
    """Two distributions over one set of bins.

    Args:
        reference: (N,) numbers, before training.
        policy: (M,) numbers, after it.
        title: Of the figure.
        unit: Label of the numbers' axis.
        counted: Label of the other one.
    """
    before, after = np.asarray(reference, np.float64), np.asarray(policy, np.float64)
    low, high = np.quantile(np.concatenate([before, after]), [0.005, 0.995])
    low, high = (low - 0.5, high + 0.5) if low == high else (low, high)
    bins = np.linspace(low, high, 41)
    with _style():
        figure = Figure(figsize=(6.5, 3.4), layout="constrained")
        axes = figure.subplots()
        for values, label, colour, hatch in (
            (before, "reference", REFERENCE, "////"),
            (after, "policy", POLICY, ""),
        ):
            clipped = np.clip(values, low, high)  # what lies beyond is counted in the last bin
            axes.hist(clipped, bins=bins.tolist(), color=colour, alpha=0.55, hatch=hatch, label=label)
            axes.axvline(float(values.mean()), color=colour, linestyle="--", linewidth=1.4)
        _finish(axes, title, f"{unit} (dashed: mean)", counted)
        return figure


def score_against_kl(
    curves: Mapping[str, Sequence[Point]], score: str, *, joined: bool = True, limit: Sequence[Point] = ()
) -> Figure:
    """What was won against what it cost, as in Figure 2 of arXiv 2305.18290; bars are 95 % intervals.

    Args:
        curves: Label -> points in the order in which they are joined.
        score: Label of the score's axis.
        joined: Whether a line joins the points of a curve.
        limit: The highest score at each KL, whatever the policy; drawn where it is known.
    """
    with _style():
        figure = Figure(figsize=(6.5, 4.2), layout="constrained")
        axes = figure.subplots()
        if limit:
            known = [point.kl.mean for point in limit]
            low, high = [point.score.low for point in limit], [point.score.high for point in limit]
            axes.fill_between(known, low, high, color=REFERENCE, alpha=0.25, linewidth=0)
            most = [point.score.mean for point in limit]
            axes.plot(known, most, color=REFERENCE, linestyle="--", label="limit of any policy")
        colours = iter(PALETTE * (1 + len(curves) // len(PALETTE)))
        for index, (label, points) in enumerate(curves.items()):
            kl, value = [point.kl.mean for point in points], [point.score.mean for point in points]
            spread = [[point.kl for point in points], [point.score for point in points]]
            bars = [
                np.abs([[p.mean - p.low for p in part], [p.high - p.mean for p in part]]) for part in spread
            ]
            axes.errorbar(
                kl,
                value,
                xerr=bars[0],
                yerr=bars[1],
                label=label,
                color=REFERENCE if label == "reference" else next(colours),
                marker="osD^vPX*"[index % 8],
                markersize=5,
                linewidth=1.4 if joined else 0,
                elinewidth=0.7,
                capsize=2,
            )
            for point in points:
                where = (point.kl.mean, point.score.mean)
                axes.annotate(point.label, where, textcoords="offset points", xytext=(5, -10), fontsize=7)
        axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
        _finish(axes, "Score against KL", "KL(policy || reference), nats a sequence", score)
        return figure


def save_png(figure: Figure, path: Path) -> None:
    """Writes the figure on white, beside its place first."""
    temporary = path.with_name(f".{path.name}.tmp")
    with _style():
        figure.savefig(temporary, format="png", dpi=144, facecolor="white")
    temporary.replace(path)


def inline_svg(figure: Figure, name: str) -> str:
    """The figure as an <svg> element for a page: scales with it, and takes its text colour.

    Args:
        figure: Any of this module.
        name: Different for every figure of a page: ids inside are derived from it.
    """
    written = io.StringIO()
    with _style(), mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = written.getvalue()
    text = text[text.index("<svg ") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    ids = sorted(set(re.findall(r'\bid="([^"]+)"', text)), key=len, reverse=True)
    for identifier in ids:  # figures of a page must not share them
        text = re.sub(
            rf'(\bid="|url\(#|href="#){re.escape(identifier)}(?=["\)])', rf"\g<1>{name}-{identifier}", text
        )
    return re.sub(
        r'(<svg [^>]*?)\swidth="[^"]*"',
        r"\1",
        re.sub(r'(<svg [^>]*?)\sheight="[^"]*"', r"\1", text, count=1),
        count=1,
    )


def _style() -> AbstractContextManager[None]:
    return mpl.rc_context(
        {
            "font.size": 9,
            "axes.titlesize": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "legend.frameon": False,
            "legend.fontsize": 8,
            "hatch.linewidth": 0.5,
            **dict.fromkeys(
                ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
            ),
        }
    )


def _curve(axes: Axes, history: Sequence[Line], name: str, label: str, colour: str) -> None:
    steps, values = curve(history, name)
    if len(steps) <= LONGEST_RAW:
        axes.plot(steps, values, color=colour, linewidth=1.2, label=label if steps else None)
        return
    width = len(steps) // 50
    axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.3)
    smooth = np.convolve(values, np.ones(width) / width, mode="valid")
    axes.plot(
        steps[width - 1 :], smooth, color=colour, linewidth=1.4, label=f"{label}, mean of {width} steps"
    )


def _dots(axes: Axes, history: Sequence[Line], name: str, label: str, colour: str) -> None:
    steps, values = curve(history, name)
    if steps:
        axes.plot(steps, values, color=colour, linestyle="--", marker="o", markersize=4, label=label)


def _finish(axes: Axes, title: str, horizontal: str, vertical: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(horizontal)
    axes.set_ylabel(vertical)
    if axes.get_legend_handles_labels()[1]:
        axes.legend()
