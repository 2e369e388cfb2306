"""Counting the weights that a run has moved."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.unmoved import unmoved


def test_weights_that_are_as_in_the_reference_are_counted(tmp_path: Path) -> None:
    for name, values in {"reference": [1.0, 2.0, 3.0], "policy": [1.0, 2.5, 3.0]}.items():
        (tmp_path / name).mkdir()
        weight = torch.tensor(values, dtype=torch.bfloat16)
        save_file({"weight": weight, name: weight.clone()}, tmp_path / name / "model.safetensors")
    assert unmoved(tmp_path / "reference", tmp_path / "policy") == (2, 3)
