"""Masters that start between bfloat16 values: the same policy, in which small updates show at once."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dpo import random_bits
from dpo.config import ModelConfig, OptimizationConfig
from dpo.data.trees import sequence_batch
from dpo.engine import world
from dpo.engine.dither import dither, dither_shards
from dpo.engine.engine import Engine
from dpo.model.load import load_model
from dpo.random_bits import stream_key

SEQUENCES = [(np.arange(3, dtype=np.int32), np.arange(3, 9, dtype=np.int32))]
EVERY_BFLOAT16 = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)


def normal(number: int) -> Tensor:
    return torch.randn(number, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


def dithered(weight: Tensor, key: int = 1) -> Tensor:
    masters = weight.float()
    dither(masters, key)
    return masters


@pytest.mark.parametrize("key", [1, -7])
def test_every_weight_is_its_masters_rounded(key: int) -> None:
    finite = EVERY_BFLOAT16[EVERY_BFLOAT16.isfinite()].repeat(40)
    masters = dithered(finite, key)
    assert torch.equal(masters.to(torch.bfloat16).view(torch.int16), finite.view(torch.int16))  # -0 too
    assert torch.equal(masters[finite == 0], finite[finite == 0].float())
    assert float((masters == finite.float())[finite != 0].float().mean()) < 1e-3


def test_masters_are_uniform_between_the_halves_of_the_spacings() -> None:
    weight = torch.full((200_000,), 0.75, dtype=torch.bfloat16)
    spacing = 2.0**-8
    moved = ((dithered(weight).double() - 0.75) / spacing).sort().values
    expected = (torch.arange(len(moved), dtype=torch.float64) + 0.5) / len(moved) - 0.5
    assert float((moved - expected).abs().max()) < 1.95 / len(moved) ** 0.5  # Kolmogorov and Smirnov's test


def test_an_update_far_below_the_spacing_shows_on_average() -> None:
    weight, update = normal(200_000), 2e-5

    def shown(masters: Tensor) -> float:
        return float(((masters + update).to(torch.bfloat16).double() - weight.double()).mean()) / update

    # A weight moves by a spacing s with probability update / s: the mean's variance is the mean of
    # update * s over their number, where s is at most 2^-7 times a weight of size 0.8 on average.
    deviation = (update * 0.8 * 2**-7 / len(weight)) ** 0.5 / update
    assert shown(dithered(weight)) == pytest.approx(1, abs=4 * deviation)
    assert shown(weight.float()) < 0.05


@pytest.mark.parametrize("at_once", [7, 2**16])
def test_a_part_gets_what_it_gets_in_the_whole(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = dithered(normal(1000))
    monkeypatch.setitem(random_bits.AT_ONCE, "cpu", at_once)
    part = normal(1000).float()[300:900].clone()
    dither(part, 1, start=300)
    assert torch.equal(part, whole[300:900])


def engine_of(folder: Path, dtype: str = "bfloat16", seed: int | None = None) -> Engine:
    model = ModelConfig(name_or_path=str(folder), dtype=dtype)  # type: ignore[arg-type]
    engine = Engine(world.start(model), load_model(model), model, OptimizationConfig())
    if seed is not None:
        engine.dither(seed)
    return engine


def masters_of(engine: Engine) -> dict[str, Tensor]:
    return {name: master.detach().clone() for name, master in engine._masters.named(engine.model)}


def test_law_1_the_policy_still_scores_as_the_reference_does_bit_for_bit(tiny_model: Path) -> None:
    plain, engine = engine_of(tiny_model), engine_of(tiny_model, seed=3)
    batch = sequence_batch(SEQUENCES)
    assert torch.equal(engine.score_only(batch), plain.score_only(batch))
    weights = plain.weights()
    assert all(torch.equal(weight, weights[name]) for name, weight in engine.weights().items())
    engine._masters.round()
    assert torch.equal(engine.score_only(batch), plain.score_only(batch))


def test_masters_depend_on_the_seed_and_on_the_name_of_a_weight(tiny_model: Path) -> None:
    first, again, other = (masters_of(engine_of(tiny_model, seed=seed)) for seed in (3, 3, 4))
    assert all(torch.equal(master, again[name]) for name, master in first.items())
    differ = {name for name, master in first.items() if not torch.equal(master, other[name])}
    plain = masters_of(engine_of(tiny_model))
    assert differ == {name for name, master in plain.items() if master.any()}
    moved = [
        (master.view(torch.int32) - plain[name].view(torch.int32)).flatten()[:8].tolist()
        for name, master in first.items()
        if name in differ and master.dim() == 2
    ]
    assert len({tuple(steps) for steps in moved}) >= len(moved) - 1  # the tied weight has two names


def test_float32_weights_are_left_alone(tiny_model: Path) -> None:
    plain, engine = (masters_of(engine_of(tiny_model, "float32", seed)) for seed in (None, 3))
    assert all(torch.equal(master, plain[name]) for name, master in engine.items())


class OnDisk:
    """DeepSpeed's optimizer at stage 3, as far as its masters go: rank 1 of two, two groups on a disk."""

    def __init__(self, groups: list[list[nn.Parameter]]) -> None:
        self.fp32_partitioned_groups_flat = [torch.zeros(0) for _ in groups]
        self._disk = [torch.cat([weight.detach().float()[4:] for weight in group]) for group in groups]
        self.grad_position = {
            id(weight): [number, 4 * place, 4]
            for number, group in enumerate(groups)
            for place, weight in enumerate(group)
        }
        self.swaps: list[tuple[str, int]] = []

    def get_param_id(self, weight: nn.Parameter) -> int:
        return id(weight)

    def _get_param_partition_rank(self, weight: nn.Parameter) -> int:
        return 1

    def _swappable_optimizer_subgroup(self, group: int) -> bool:
        return True

    def _optimizer_states_and_gradient_swap_in(self, group: int) -> None:
        self.swaps.append(("in", group))
        self.fp32_partitioned_groups_flat[group] = self._disk[group].clone()

    def _optimizer_states_and_gradient_swap_out(self, group: int) -> None:
        self.swaps.append(("out", group))
        self._disk[group] = self.fp32_partitioned_groups_flat[group]
        self.fp32_partitioned_groups_flat[group] = torch.zeros(0)


def test_masters_on_a_disk_are_read_and_written_once_a_group() -> None:
    module = nn.ParameterDict({name: nn.Parameter(normal(8)) for name in ("a", "b", "c")})
    optimizer = OnDisk([[module["a"], module["c"]], [module["b"]]])
    for weight in module.values():
        weight.ds_id, weight._z3_optimizer = 0, optimizer
    dither_shards(module, seed=3)
    assert optimizer.swaps == [("in", 0), ("out", 0), ("in", 1), ("out", 1)]
    whole = {name: dithered(normal(8), stream_key(3, name)) for name in module}
    assert torch.equal(optimizer._disk[0], torch.cat([whole["a"][4:], whole["c"][4:]]))
    assert torch.equal(optimizer._disk[1], whole["b"][4:])


def test_steps_follow_float32_from_the_first_on(tiny_model: Path) -> None:
    """The likelihood rises as in float32; without dither it hardly does."""
    batch, rate, steps = sequence_batch(SEQUENCES), 1e-6, 8

    def rise(engine: Engine) -> float:
        before = float(engine.score_only(batch))
        for _ in range(steps):
            engine.accumulate(-engine.score(batch).sum(), last=True)
            engine.update(rate)
        return float(engine.score_only(batch)) - before

    wide, dithering, plain = (
        rise(engine_of(tiny_model, dtype, seed))
        for dtype, seed in (("float32", None), ("bfloat16", 3), ("bfloat16", None))
    )
    assert dithering == pytest.approx(wide, rel=0.25)
    assert plain < wide / 5
