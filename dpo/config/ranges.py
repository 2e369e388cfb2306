"""Types of options whose type names the range that is legal; `dpo.cli.validate` checks it."""

import math
from typing import Annotated


class Within:
    """The range of a numeric option, written as an interval: `Within("(0, 1]")` is above 0 and at most 1."""

    def __init__(self, interval: str) -> None:
        low, _, high = interval[1:-1].partition(", ")
        self._text, self._low, self._high = interval, float(low), float(high)

    def __contains__(self, value: float) -> bool:
        above = value > self._low if self._text[0] == "(" else value >= self._low
        below = value < self._high if self._text[-1] == ")" else value <= self._high
        return above and below

    def __repr__(self) -> str:  # as --help and errors show it
        if self._high < math.inf:
            return f"in {self._text}"
        return f"above {self._low:g}" if self._text[0] == "(" else f"at least {self._low:g}"


Positive = Annotated[float, Within("(0, inf)")]
NotNegative = Annotated[float, Within("[0, inf)")]
Count = Annotated[int, Within("[1, inf)")]
CountOrZero = Annotated[int, Within("[0, inf)")]
Decay = Annotated[float, Within("[0, 1)")]
Tokens = Annotated[int, Within("[2, inf)")]
