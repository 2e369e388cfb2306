"""A report on a model that generates HTML and scripts, for the tests of the page and for a real browser."""

import numpy as np

from dpo.evaluate.statistics import Interval
from dpo.report.content import Captioned, PairRow, Provenance, Report, SampleRow, Section
from dpo.report.figures import (
    Point,
    histogram_before_and_after,
    histograms,
    losses_and_margins,
    rewards_over_steps,
    score_against_kl,
)

MARKUP = """<script>document.title = 'ran'</script><img src=x onerror="document.title = 'ran'">"""
NASTY = MARKUP + "\x1b[31m {{ 7 * 7 }}"


def history(steps: int) -> list[dict[str, float]]:
    names = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
    lines = [{"step": step, **{f"train/{name}": 1 / step for name in names}} for step in range(1, steps + 1)]
    return [{"step": 0, **{f"eval/{name}": 0.7 for name in names}}, *lines]


def figures(steps: int = 300) -> list[Captioned]:
    rng = np.random.default_rng(0)
    point = Point(label="policy", kl=Interval(1.0, 0.5, 1.5), score=Interval(0.3, 0.2, 0.4))
    made = {
        "training": losses_and_margins({"": history(steps)}),
        "rewards": rewards_over_steps(history(steps)),
        "margins": histogram_before_and_after(
            rng.normal(size=50), rng.normal(size=50) + 1, title="Margins", unit="nats", counted="pairs"
        ),
        "score_kl": score_against_kl({"beta 0.1": [point]}),
    }
    return [Captioned(name=n, title=n, caption=f"caption of {n}", figure=made[n]) for n in made]


def data_section(*, with_figures: bool) -> Section:
    figure = histograms({"chosen": [1, 2, 2], "rejected": [3]}, title="t", unit="tokens", counted="pairs")
    drawn = Captioned(name="lengths", title="lengths", caption="caption of lengths", figure=figure)
    return Section(
        title="Lengths",
        notes=[NASTY],
        columns=("", NASTY),
        rows=[(NASTY, "1")],
        figures=[drawn] if with_figures else [],
        measure="nats",
        pairs=[PairRow(prompt=NASTY, chosen=NASTY, rejected=NASTY, measure="-2")],
    )


def nasty_report(*, with_figures: bool = True) -> Report:
    rows = [
        SampleRow(index=n, seed=7, prompt=f"{n} {NASTY}", reference=NASTY, policy=NASTY) for n in range(3)
    ]
    return Report(
        summary={"win_rate": 0.9, "win_rate/low": 0.8, "win_rate/high": 0.95, NASTY: 0.5},
        rows=rows,
        table_rows=2,
        provenance=Provenance(
            essentials={"policy": NASTY},
            commands=[f"python -m dpo evaluate --run_dir {NASTY}"],
            versions={NASTY: NASTY},
        ),
        figures=figures() if with_figures else [],
        worst_pairs=[PairRow(prompt=NASTY, chosen=NASTY, rejected=NASTY, measure="-1.50")],
        worst_samples=rows[:1],
        data=[data_section(with_figures=with_figures)],
    )
