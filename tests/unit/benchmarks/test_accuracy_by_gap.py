import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.accuracy_by_gap import by_gap, read_pairs


def written(folder: Path, correct: list[list[float]]) -> tuple[Path, Path]:
    """Data of two prompts with two pairs each, and a run that ordered them so."""
    row = {"pairs": [{"chosen": 0, "rejected": 1}, {"chosen": 0, "rejected": 2}]}
    rows = [{**row, "scores": [0.9, 0.8, 0.1]}, {**row, "scores": [0.5, 0.3, -1.0]}]
    pq.write_table(pa.Table.from_pylist(rows), folder / "test.parquet")
    lines = [{"prompt": number, "correct": each} for number, own in enumerate(correct) for each in own]
    (folder / "report").mkdir()
    (folder / "report" / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder, folder


def test_pairs_are_joined_with_their_scores_and_quartered_by_the_gap(tmp_path: Path) -> None:
    pairs = read_pairs(*written(tmp_path, [[0.0, 1.0], [0.5, 1.0]]))
    assert pairs.gaps == pytest.approx([0.1, 0.8, 0.2, 1.5])
    assert np.array_equal(pairs.prompts, [0, 0, 1, 1])
    assert [(accuracy[:5], number) for _, accuracy, number in by_gap(pairs)] == [
        ("0.000", 1),
        ("0.500", 1),
        ("1.000", 1),
        ("1.000", 1),
    ]


def test_a_run_on_other_pairs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="other pairs"):
        read_pairs(*written(tmp_path, [[0.0, 1.0], [1.0]]))
