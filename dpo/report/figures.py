"""Figures of reports and comparisons: pure functions of numbers, without matplotlib's global state.

A figure is saved as PNG for Markdown, and as SVG inside a page, where its text and axes take the page's
colour, so that it is readable in light and in dark mode.
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
from dpo.files import write_file
from dpo.report import labels
from dpo.tracking.history import Line, curve

REFERENCE, POLICY = "#8a8f98", "#e0662f"  # distinct without colour, too: the reference is hatched or dashed
CHOSEN, REJECTED = "#2b8cbe", "#d6604d"
PALETTE = ("#e0662f", "#2b8cbe", "#4d9a4d", "#9467bd", "#c2a12b", "#d64d8a", "#17a3a3", "#8c6d4f")
INK = "#010203"
"""Placeholder for the colour of text and axes, which a page replaces by its own."""
LONGEST_RAW = 100
"""Most steps of a curve that is drawn unsmoothed; of a longer one the running mean is drawn over it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One model in the plane of KL and score."""

    label: str
    """Written beside the point; may be empty."""
    kl: Interval
    """KL(policy || reference), nats per sequence."""
    score: Interval

    @classmethod
    def of(cls, summary: Mapping[str, float], label: str = "") -> "Point":
        """The policy of a summary.json that has a KL and scores."""
        kl, score = Interval.of(summary, "kl/sequence"), Interval.of(summary, "score/policy")
        return cls(label=label, kl=kl, score=score)

    @classmethod
    def of_reference(cls, summary: Mapping[str, float]) -> "Point":
        """The reference of the same, at KL 0."""
        return cls(label="", kl=Interval(0.0, 0.0, 0.0), score=Interval.of(summary, "score/reference"))


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
        _finish(left, "Loss", "optimizer step", "loss per pair")
        _finish(right, "Reward margin", "optimizer step", "chosen - rejected, including beta")
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
        _finish(axes, "Rewards", "optimizer step", "implicit reward, including beta")
        return figure


def histogram_before_and_after(
    reference: npt.ArrayLike, policy: npt.ArrayLike, *, title: str, unit: str, counted: str
) -> Figure:
    """Two distributions over the same bins.

    Args:
        reference: (N,) numbers, before training.
        policy: (M,) numbers, after training.
        title: Of the figure.
        unit: Label of the horizontal axis.
        counted: Label of the vertical axis.
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
            clipped = np.clip(values, low, high)  # outliers count in the outermost bins
            axes.hist(clipped, bins=bins.tolist(), color=colour, alpha=0.55, hatch=hatch, label=label)
            axes.axvline(float(values.mean()), color=colour, linestyle="--", linewidth=1.4)
        _finish(axes, title, f"{unit} (dashed: mean)", counted)
        return figure


def histograms(values: Mapping[str, npt.ArrayLike], *, title: str, unit: str, counted: str) -> Figure:
    """One or two distributions of counts such as tokens, over the same bins of whole numbers.

    Args:
        values: Label -> (N,) integers; a second label is drawn over the first.
        title: Of the figure.
        unit: Label of the horizontal axis.
        counted: Label of the vertical axis.
    """
    arrays = {label: np.asarray(numbers) for label, numbers in values.items()}
    everything = np.concatenate([*arrays.values()])
    low, high = int(everything.min()), int(np.quantile(everything, 0.995))
    bins = np.unique(np.linspace(low, high + 1, 41).round())
    with _style():
        figure = Figure(figsize=(6.5, 3.4), layout="constrained")
        axes = figure.subplots()
        colours = (CHOSEN, REJECTED) if len(arrays) > 1 else (REFERENCE,)
        for (label, numbers), colour, hatch in zip(arrays.items(), colours, ("", "////"), strict=False):
            counts, _ = np.histogram(np.clip(numbers, low, high), bins)  # outliers count in the last bin
            axes.stairs(counts, bins, fill=True, color=colour, alpha=0.55, hatch=hatch, label=label)
            axes.axvline(float(numbers.mean()), color=colour, linestyle="--", linewidth=1.4)
        _finish(axes, title, f"{unit} (dashed: mean)", counted)
        return figure


def score_against_kl(
    curves: Mapping[str, Sequence[Point]], *, joined: bool = True, limit: Sequence[Point] = ()
) -> Figure:
    """What policies gain against what it costs, as in Figure 2 of arXiv 2305.18290; bars are 95 % intervals.

    Args:
        curves: Label -> points in the order in which they are joined.
        joined: Whether a line joins the points of a curve.
        limit: The highest score of any policy at each KL, as far as it is known.
    """
    with _style():
        figure = Figure(figsize=(6.5, 4.2), layout="constrained")
        axes = figure.subplots()
        if limit:
            _band(axes, limit, "limit of any policy")
        colours = iter(PALETTE * (1 + len(curves) // len(PALETTE)))
        for index, (label, points) in enumerate(curves.items()):
            axes.errorbar(
                [point.kl.mean for point in points],
                [point.score.mean for point in points],
                xerr=_bars([point.kl for point in points]),
                yerr=_bars([point.score for point in points]),
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
        _finish(axes, "Score against KL", labels.full("kl/sequence"), labels.short("score/policy"))
        return figure


def save_png(figure: Figure, path: Path) -> None:
    """Writes the figure on a white background, atomically."""
    written = io.BytesIO()
    with _style():
        figure.savefig(written, format="png", dpi=144, facecolor="white")
    write_file(path, written.getvalue())


def inline_svg(figure: Figure, name: str) -> str:
    """The figure as an <svg> element of a page: it scales with the page and takes its text colour.

    Args:
        figure: Any of this module.
        name: Unique within the page: the ids inside the figure are derived from it.
    """
    written = io.StringIO()
    with _style(), mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = written.getvalue()
    text = text[text.index("<svg ") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    ids = sorted(set(re.findall(r'\bid="([^"]+)"', text)), key=len, reverse=True)
    for identifier in ids:  # figures of a page must not share ids
        text = re.sub(
            rf'(\bid="|url\(#|href="#){re.escape(identifier)}(?=["\)])', rf"\g<1>{name}-{identifier}", text
        )
    for size in ("width", "height"):
        text = re.sub(rf'(<svg [^>]*?)\s{size}="[^"]*"', r"\1", text, count=1)
    return text


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


def _band(axes: Axes, points: Sequence[Point], label: str) -> None:
    """A dashed line of scores over KL with its interval as a band."""
    kl, scores = [point.kl.mean for point in points], [point.score for point in points]
    low, high = [score.low for score in scores], [score.high for score in scores]
    axes.fill_between(kl, low, high, color=REFERENCE, alpha=0.25, linewidth=0)
    axes.plot(kl, [score.mean for score in scores], color=REFERENCE, linestyle="--", label=label)


def _bars(intervals: Sequence[Interval]) -> npt.NDArray[np.float64]:
    """(2, N) lengths of error bars, below and above."""
    ends = [[i.mean - i.low for i in intervals], [i.high - i.mean for i in intervals]]
    return np.abs(np.asarray(ends, np.float64))


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
