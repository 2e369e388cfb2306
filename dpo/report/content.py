"""What a report holds."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from dpo.report.figures import Captioned


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRow:
    """One held-out prompt and what both models made of it with the same seed."""

    index: int
    """Of the prompt in the held-out set."""
    seed: int
    prompt: str
    reference: str
    policy: str
    reference_score: float | None = None
    """None where no scorer was given."""
    policy_score: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRow:
    """A held-out pair and what the policy makes of it."""

    prompt: str
    chosen: str
    rejected: str
    margin: float
    """Reward of the chosen less that of the rejected; negative where the policy ranks them wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that an evaluation found."""

    summary: dict[str, float]
    """Flat, under the names of summary.json; an interval is `<name>/low` and `<name>/high`."""
    rows: Sequence[SampleRow]
    """All samples, in the order of the held-out prompts."""
    table_rows: int
    """How many of them report.md shows: always the first."""
    essentials: dict[str, str]
    """What was compared and how: models, reference identity, data, temperature, scorer."""
    commands: Sequence[str]
    """The commands that made this report, as a person would type them."""
    provenance: dict[str, str] = field(default_factory=dict)
    """Versions, and digests of data and cache."""
    figures: Sequence[Captioned] = ()
    worst_pairs: Sequence[PairRow] = ()
    """Held-out pairs that the policy ranks wrong, the worst first."""
    worst_samples: Sequence[SampleRow] = ()
    """Samples that score below the reference's, the worst first."""
