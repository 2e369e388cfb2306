"""Rows in the layouts of well-known public data sets -> rows with our columns.

A layout is recognized by its columns. What it does not use stays in the row, and is named as unused later.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dpo.data.fields import RowError, as_list, brief


class Layout(NamedTuple):
    """How one data set writes a preference."""

    source: str
    """Where it is from."""
    columns: frozenset[str]
    """A row that has all of them has this layout."""
    convert: Callable[[Mapping[str, Any]], dict[str, Any]]
    """Those columns of a row -> our columns. Raises RowError."""


def in_our_columns(row: Any) -> Any:
    """The row with our columns; as it is where its layout is none of `LAYOUTS`.

    Raises:
        RowError: A value that the layout does not have.
    """
    if isinstance(row, Mapping):
        for layout in LAYOUTS:
            if layout.columns <= row.keys():
                others = {name: value for name, value in row.items() if name not in layout.columns}
                return others | layout.convert(row)
    return row


def _shp(row: Mapping[str, Any]) -> dict[str, Any]:
    """Two answers to a post; label 1 prefers the first."""
    if (label := row["labels"]) not in (0, 1):
        raise RowError(
            "bad_pairs", f"labels is {brief(label)}; expected 1 for human_ref_A or 0 for human_ref_B"
        )
    return {
        "prompt": row["history"],
        "completions": [row["human_ref_A"], row["human_ref_B"]],
        "pairs": [[0, 1] if label else [1, 0]],
    }


def _strength(responses: tuple[str, str], strength: str, prompt: str) -> Callable[..., dict[str, Any]]:
    """Two responses and a number from -3, the first is much better, to 3, the second is."""

    def convert(row: Mapping[str, Any]) -> dict[str, Any]:
        completions = [row[name] for name in responses]
        return {"prompt": row[prompt], "completions": completions, "scores": [0, row[strength]]}

    return convert


def _ranked(row: Mapping[str, Any]) -> dict[str, Any]:
    """Answers with their ranks, 1 for the best."""
    answers = _objects(row["answers"], "answers", ("answer", "rank"))
    ranks = [answer["rank"] for answer in answers]
    if not all(isinstance(rank, int | float) for rank in ranks):
        raise RowError("bad_scores", f"answers has the ranks {brief(ranks)}; expected numbers")
    return {
        "prompt": row["prompt"],
        "completions": [answer["answer"] for answer in answers],
        "scores": [-rank for rank in ranks],
    }


def _rated(row: Mapping[str, Any]) -> dict[str, Any]:
    """Completions that are objects with a response and a score."""
    completions = row["completions"]
    if not all(isinstance(item, Mapping) and "response" in item for item in completions or [None]):
        return {name: row[name] for name in ("instruction", "completions")}  # texts, as ours are
    objects = _objects(completions, "completions", ("response", "overall_score"))
    return {
        "instruction": row["instruction"],
        "completions": [item["response"] for item in objects],
        "scores": [item["overall_score"] for item in objects],
    }


def _objects(value: Any, name: str, keys: tuple[str, ...]) -> list[Mapping[str, Any]]:
    items = list(as_list(value, name))
    for item in items:
        if not isinstance(item, Mapping) or not all(key in item for key in keys):
            raise RowError(
                "not_text", f"{name} has {brief(item)}; expected an object with {' and '.join(keys)}"
            )
    return items


LAYOUTS = (
    Layout("SHP", frozenset({"history", "human_ref_A", "human_ref_B", "labels"}), _shp),
    Layout(
        "HelpSteer2, preferences",
        frozenset({"prompt", "response_1", "response_2", "preference_strength"}),
        _strength(("response_1", "response_2"), "preference_strength", "prompt"),
    ),
    Layout(
        "HelpSteer3",
        frozenset({"context", "response1", "response2", "overall_preference"}),
        _strength(("response1", "response2"), "overall_preference", "context"),
    ),
    Layout("Nectar", frozenset({"prompt", "answers"}), _ranked),
    Layout("UltraFeedback", frozenset({"instruction", "completions"}), _rated),
)
