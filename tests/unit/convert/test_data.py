"""Their ways to name data sets."""

from typing import Any

import pytest

from dpo.convert.rules import convert

HANDBOOK = {
    "dataset_mixture": {
        "datasets": [
            {"id": "a/b", "config": "c", "split": "train_x", "columns": ["chosen"], "weight": 0.5},
            {"id": "d", "config": "default", "weight": 1.0},
        ],
        "test_split_size": 100,
    }
}


@pytest.mark.parametrize(
    ("given", "train", "test"),
    [
        ({"dataset_name": "a/b"}, "a/b", None),
        (
            {"dataset_name": "a/b", "dataset_config": "c", "dataset_train_split": "x"},
            {"path": "a/b", "name": "c", "split": "x"},
            None,
        ),
        ({"dataset_name": "a", "eval_strategy": "steps"}, "a", {"path": "a"}),
        (
            {"dataset_name": "a", "do_eval": True, "dataset_test_split": "held"},
            "a",
            {"path": "a", "split": "held"},
        ),
        (
            {"dataset_mixer": {"a": 1.0, "b": 0.5}, "dataset_splits": ["train_prefs", "test_prefs"]},
            [{"path": "a", "split": "train_prefs"}, {"path": "b", "split": "train_prefs", "weight": 0.5}],
            [{"path": "a", "split": "test_prefs"}, {"path": "b", "split": "test_prefs"}],
        ),
        (HANDBOOK, [{"path": "a/b", "name": "c", "split": "train_x", "weight": 0.5}, "d"], None),
        (
            {"datasets": [{"path": "a", "name": "c", "fraction": 0.1}]},
            {"path": "a", "name": "c", "weight": 0.1},
            None,
        ),
        ({"datasets": [{"path": "json", "data_files": "x.jsonl"}]}, "x.jsonl", None),
    ],
)
def test_data_sets(given: dict[str, Any], train: Any, test: Any) -> None:
    ours = {key: value for line in convert(given, 1) for key, value in line.ours.items()}
    assert ours["data.train"] == train
    assert ours.get("data.test") == test


def test_what_a_mixture_asks_beyond_that_is_named() -> None:
    said = " ".join(str(line) for line in convert(HANDBOOK, 1) if line.became.value == "not mapped")
    assert "test_split_size: 100" in said
