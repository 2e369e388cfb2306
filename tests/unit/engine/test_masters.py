"""Float32 masters on one device: the policy computes as a bfloat16 reference, and updates do not round."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dpo.config import LoraConfig, ModelConfig, OptimizationConfig
from dpo.data.trees import sequence_batch
from dpo.engine import masters, world
from dpo.engine.engine import Engine
from dpo.engine.frozen import frozen_scorer
from dpo.engine.masters import Masters
from dpo.errors import RunFailed
from dpo.model.lora import load_policy

RNG = np.random.default_rng(0)
SEQUENCES = [(np.arange(3, dtype=np.int32), RNG.integers(0, 99, n).astype(np.int32)) for n in (5, 9, 13)]


def configured(folder: Path, *, lora: bool = False) -> ModelConfig:
    adapter = LoraConfig(rank=4) if lora else None
    return ModelConfig(name_or_path=str(folder), dtype="bfloat16", lora=adapter)


def engine_of(model: ModelConfig, **options: object) -> Engine:
    policy = load_policy(model, dtype=torch.bfloat16, seed=0)
    settings = OptimizationConfig(**{"learning_rate": 1e-3, **options})  # type: ignore[arg-type]
    return Engine(world.start(model), policy, model, settings)


def advance(engine: Engine, rate: float = 1e-3) -> float:
    for number, sequence in enumerate(SEQUENCES):
        last = number == len(SEQUENCES) - 1
        engine.accumulate(-engine.score(sequence_batch([sequence])).sum() / 30, last=last)
    return engine.update(rate)


def masters_of(engine: Engine) -> dict[str, Tensor]:
    return {name: master.detach().clone() for name, master in engine._masters.named(engine.model)}


@pytest.mark.parametrize("lora", [False, True])
def test_law_1_the_policy_scores_as_the_reference_does_bit_for_bit(tiny_model: Path, lora: bool) -> None:
    batch = sequence_batch(SEQUENCES)
    with frozen_scorer(ModelConfig(name_or_path=str(tiny_model), dtype="bfloat16"), sharded=False) as frozen:
        reference = frozen(batch).detach()
    engine = engine_of(configured(tiny_model, lora=lora))
    assert torch.equal(engine.score_only(batch), reference)
    advance(engine, 0.01)
    assert not torch.equal(engine.score_only(batch), reference)


@pytest.mark.parametrize("lora", [False, True])
def test_weights_are_the_rounded_masters_and_masters_are_finer(tiny_model: Path, lora: bool) -> None:
    engine = engine_of(configured(tiny_model, lora=lora))
    for _ in range(3):
        advance(engine)
    trained = {name: w for name, w in engine.model.named_parameters() if w.requires_grad}
    found = masters_of(engine)
    assert trained.keys() <= found.keys()
    for name, weight in trained.items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, found[name].bfloat16())
    assert any(not torch.equal(found[name], weight.float()) for name, weight in trained.items())


def test_steps_smaller_than_a_rounding_add_up(tiny_model: Path) -> None:
    engine = engine_of(configured(tiny_model), optimizer="lion", learning_rate=1e-5)
    before, rate, steps = masters_of(engine), 1e-5, 4
    for _ in range(steps):
        advance(engine, rate)
    moved = [(master - before[name]).abs().max() for name, master in masters_of(engine).items()]
    assert max(moved).item() == pytest.approx(steps * rate, rel=0.02)


def test_gradients_are_summed_in_float32(tiny_model: Path) -> None:
    engine = engine_of(configured(tiny_model))
    bare = load_policy(configured(tiny_model), dtype=torch.bfloat16, seed=0)
    alone = Engine(world.start(configured(tiny_model)), bare, configured(tiny_model), OptimizationConfig())
    total: dict[str, Tensor] = {}
    for sequence in SEQUENCES:
        for each in (engine, alone):
            each.accumulate(-each.score(sequence_batch([sequence])).sum(), last=False)
        for name, master in alone._masters.named(bare):
            assert master.grad is not None
            part = master.grad.clone()
            assert torch.equal(part, part.bfloat16().float()), "one micro-batch has a gradient in bfloat16"
            total[name] = total.get(name, torch.zeros_like(part)) + part
        alone._masters.zero_gradients()
    found = dict(engine._masters.named(engine.model))
    assert all(torch.equal(found[name].grad, gradient) for name, gradient in total.items())  # type: ignore[arg-type]
    assert all(weight.grad is None for weight in engine.model.parameters())


@pytest.mark.parametrize("lora", [False, True])
def test_masters_are_saved_and_come_back(tiny_model: Path, tmp_path: Path, lora: bool) -> None:
    first, second = (engine_of(configured(tiny_model, lora=lora)) for _ in range(2))
    advance(first)
    first.save(tmp_path)()
    norms = [advance(first), advance(first)]
    second.load(tmp_path)
    assert [advance(second), advance(second)] == norms
    ours, theirs = masters_of(first), masters_of(second)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    exported = first.weights()
    assert all(torch.equal(weight, second.weights()[name]) for name, weight in exported.items())


def test_a_gradient_that_is_not_finite_changes_nothing(tiny_model: Path) -> None:
    engine, other = engine_of(configured(tiny_model)), engine_of(configured(tiny_model))
    engine.accumulate(engine.score(sequence_batch(SEQUENCES)).sum() * torch.inf, last=True)
    assert not np.isfinite(engine.update(1e-3))
    assert advance(engine) == advance(other)
    assert all(torch.equal(master, masters_of(other)[name]) for name, master in masters_of(engine).items())


def test_all_gradients_are_sent_once_per_step_in_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second backward pass does not reach the last layer, as of a rank whose tokens meet no expert."""
    sent: list[int] = []

    class Done:
        def wait(self) -> None:
            pass

    def all_reduce(tensor: Tensor, *, async_op: bool) -> Done:
        assert async_op
        sent.append(tensor.numel())
        return Done()

    monkeypatch.setattr(masters, "BUCKET_ELEMENTS", 30)
    monkeypatch.setattr(masters.distributed, "is_distributed", lambda: True)
    monkeypatch.setattr(masters.dist, "broadcast", lambda tensor, *, src: None)
    monkeypatch.setattr(masters.dist, "all_reduce", all_reduce)
    layers = [nn.Linear(4, 4).bfloat16() for _ in range(3)]
    made = Masters([weight for layer in layers for weight in layer.parameters()])
    orders = []
    for whole in (True, False):
        hidden = torch.ones(1, 4, dtype=torch.bfloat16)
        for layer in layers if whole else layers[:2]:
            hidden = layer(hidden)
        made.backward(hidden.sum(), last=False)
        assert sent == []
        hidden = layers[0](torch.ones(1, 4, dtype=torch.bfloat16))
        for layer in layers[1:] if whole else layers[1:2]:
            hidden = layer(hidden)
        made.backward(hidden.sum(), last=True)
        orders.append([*sent])
        sent.clear()
    assert orders[0] == orders[1] == [24, 20, 16]


def test_a_second_gradient_of_what_was_sent_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Masters([weight := nn.Parameter(torch.ones(3))])
    made.backward(weight.sum() * 2, last=True)
    assert torch.equal(weight.grad, torch.full((3,), 2.0))  # type: ignore[arg-type]
    made._buckets[0].work = object()  # type: ignore[assignment]
    with pytest.raises(RunFailed, match="second gradient"):
        made.backward(weight.sum(), last=True)
