"""Masters between bfloat16 values: the same weights, and small updates show; and weights that moved."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.dithered import dither
from benchmarks.unmoved import unmoved


def test_dithered_masters_round_to_the_weights_and_show_a_small_update_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(200_000, generator=generator).to(torch.bfloat16)
    masters, update = dither(weight, seed=1), 2e-5
    assert torch.equal(masters.to(torch.bfloat16), weight)
    assert torch.equal(dither(weight, seed=1), masters)

    def shown(of: torch.Tensor) -> float:
        return float(((of + update).to(torch.bfloat16).float() - weight.float()).mean()) / update

    assert abs(shown(masters) - 1) < 0.3  # a few hundred weights that move by a whole spacing
    assert shown(weight.float()) < 0.05


def test_weights_that_are_as_in_the_reference_are_counted(tmp_path: Path) -> None:
    for name, values in {"reference": [1.0, 2.0, 3.0], "policy": [1.0, 2.5, 3.0]}.items():
        (tmp_path / name).mkdir()
        weight = torch.tensor(values, dtype=torch.bfloat16)
        save_file({"weight": weight, name: weight.clone()}, tmp_path / name / "model.safetensors")
    assert unmoved(tmp_path / "reference", tmp_path / "policy") == (2, 3)
