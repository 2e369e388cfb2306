"""The content of a report, whatever its format: what `build` makes, and `markdown` and `html` show.

Records and the fixed texts around them; nothing here computes or writes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # matplotlib takes a third of a second to import, and training draws nothing
    from matplotlib.figure import Figure

COLUMNS = ("query", "reference policy", "DPO-trained policy")
"""Of the table of samples."""
WORST_SAMPLES = (
    "Selected as failures: the samples that score furthest below the reference's sample on the same prompt."
)
PAIR_COLUMNS = ("query", "chosen", "rejected")
"""Of a table of pairs, before that of their measure."""
WORST_PAIRS = "Selected as failures: the held-out pairs with the largest margin in the wrong direction."


@dataclass(frozen=True, slots=True, kw_only=True)
class Captioned:
    """A figure with its title and caption."""

    name: str
    """Of its file, without the extension."""
    title: str
    caption: str
    """What is drawn and how to read it."""
    figure: "Figure"


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRow:
    """One held-out prompt and its continuations by both models with the same seed."""

    index: int
    """Of the prompt in the held-out set."""
    seed: int
    prompt: str
    reference: str
    policy: str
    reference_score: float | None = None
    """None without a scorer."""
    policy_score: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRow:
    """A pair that a report shows as an example."""

    prompt: str
    chosen: str
    rejected: str
    measure: str
    """Why it is shown: a number, such as its reward margin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A titled part of a report: sentences, a table, figures and pairs, in this order."""

    title: str
    notes: Sequence[str] = ()
    """Sentences, a paragraph each."""
    columns: Sequence[str] = ()
    """Of the table; the first is that of the labels."""
    rows: Sequence[Sequence[str]] = ()
    figures: Sequence[Captioned] = ()
    measure: str = ""
    """What `PairRow.measure` of its pairs is."""
    pairs: Sequence[PairRow] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """What a training did, as opposed to what it was told."""

    steps: int
    """Optimizer steps."""
    warmup: int
    """Those of them that the warm-up took."""
    train: str
    """Pairs and prompts, or sequences, that it learned from, and what was dropped or cut of them."""
    held_out: str
    """The same of the held-out data; empty without any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where the numbers come from."""

    essentials: dict[str, str]
    """What was compared and how: models, data, temperature, scorer."""
    commands: Sequence[str]
    """The commands that lead to this report, as typed in a shell."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of the software, digests of data and cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that an evaluation found."""

    summary: dict[str, float]
    """Flat, under the names of summary.json; an interval is `<name>/low` and `<name>/high`."""
    rows: Sequence[SampleRow]
    """All samples, in the order of the held-out prompts."""
    table_rows: int
    """How many of them the report shows: always the first."""
    provenance: Provenance
    figures: Sequence[Captioned] = ()
    data: Sequence[Section] = ()
    """The data that was trained and evaluated on."""
    held_out: Sequence[Mapping[str, float]] = ()
    """Values of every held-out pair, for `dpo compare`: prompt, correct, margin, loss, unit."""
    for_judges: Sequence[Mapping[str, Any]] = ()
    """Samples in AlpacaEval's layout, one per prompt and model."""
    judged: Sequence[Mapping[str, Any]] = ()
    """Verdicts of the judge, one per prompt."""
    worst_pairs: Sequence[PairRow] = ()
    """Held-out pairs that the policy ranks wrong, the worst first."""
    worst_samples: Sequence[SampleRow] = ()
    """Samples that score below the reference's, the worst first."""

    @property
    def shown(self) -> Sequence[SampleRow]:
        """The rows of the table of samples."""
        return self.rows[: self.table_rows]

    @property
    def samples_note(self) -> str:
        """The sentence above the table of samples."""
        seeds = ", ".join(str(seed) for seed in sorted({row.seed for row in self.shown}))
        return (
            f"The first {len(self.shown)} held-out prompts, not cherry-picked, each continued by both models "
            f"with seed {seeds}. All samples are in samples.jsonl."
        )
