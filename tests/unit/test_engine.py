"""Schedules and optimizers by hand, and the engine on one device: a step is that of one big batch."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from dpo import engine as engine_module
from dpo.config import ModelConfig, OptimizationConfig
from dpo.data.trees import sequence_batch
from dpo.engine import Engine
from dpo.errors import UserError
from dpo.model.load import load_model
from dpo.optimizer import learning_rate, make_optimizer


def rates(num_steps: int, **options: object) -> list[float]:
    config = OptimizationConfig(learning_rate=1.0, **options)  # type: ignore[arg-type]
    return [learning_rate(step, num_steps, config) for step in range(1, num_steps + 1)]


def test_the_warm_up_is_linear_and_then_constant() -> None:
    assert rates(40, warmup_steps=4)[:6] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert set(rates(40, warmup_steps=4)[3:]) == {1.0}


def test_the_warm_up_takes_a_tenth_of_a_short_run_at_most() -> None:
    assert rates(20, warmup_steps=150)[:4] == [0.5, 1.0, 1.0, 1.0]
    assert rates(9, warmup_steps=150) == [1.0] * 9


def test_no_warm_up_starts_at_the_peak() -> None:
    assert rates(20, warmup_steps=0) == [1.0] * 20


def test_a_linear_decay_starts_at_the_peak_and_ends_one_step_before_zero() -> None:
    # 10 steps of which 1 warms up: the other 9 go from 1 down in ninths.
    expected = [1.0] + [1 - step / 9 for step in range(9)]
    assert rates(10, schedule="linear", warmup_steps=1) == pytest.approx(expected)


def test_a_cosine_decay_is_half_way_in_the_middle() -> None:
    found = rates(8, schedule="cosine", warmup_steps=0)
    assert found == pytest.approx([(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)])
    assert found[4] == pytest.approx(0.5)
    assert found == sorted(found, reverse=True)


def test_the_peak_scales_everything() -> None:
    options = OptimizationConfig(learning_rate=3e-4, schedule="cosine", warmup_steps=2)
    one = OptimizationConfig(learning_rate=1.0, schedule="cosine", warmup_steps=2)
    for step in (1, 2, 11, 30):
        assert learning_rate(step, 30, options) == pytest.approx(3e-4 * learning_rate(step, 30, one))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.LayerNorm(2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def test_weight_decay_is_of_matrices_only() -> None:
    module = Small()
    optimizer = make_optimizer(module, OptimizationConfig(weight_decay=0.1))
    groups = {group["weight_decay"]: [id(p) for p in group["params"]] for group in optimizer.param_groups}
    assert groups == {
        0.1: [id(module.linear.weight)],
        0.0: [id(module.linear.bias), id(module.norm.weight), id(module.norm.bias)],
    }


def test_adamw_has_the_betas_of_the_configuration() -> None:
    options = OptimizationConfig(adam_betas=(0.8, 0.95), learning_rate=0.5)
    optimizer = make_optimizer(Small(), options)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert all(g["betas"] == (0.8, 0.95) and g["lr"] == 0.5 for g in optimizer.param_groups)


def test_rmsprop_is_the_papers() -> None:
    optimizer = make_optimizer(Small(), OptimizationConfig(optimizer="rmsprop", weight_decay=0.1))
    assert isinstance(optimizer, torch.optim.RMSprop)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
    assert all(g["alpha"] == 0.99 for g in optimizer.param_groups)


def test_a_module_without_matrices_has_no_empty_group() -> None:
    assert len(make_optimizer(nn.LayerNorm(2), OptimizationConfig()).param_groups) == 1


def tiny_engine(folder: Path, **options: object) -> Engine:
    model = ModelConfig(name_or_path=str(folder), dtype="float32")
    accelerator = engine_module.start(model)
    settings = OptimizationConfig(**options)  # type: ignore[arg-type]
    return Engine(accelerator, load_model(model, dtype=torch.float32), model, settings)


def test_the_engine_says_what_it_is(tiny_model: Path) -> None:
    engine = tiny_engine(tiny_model)
    assert engine.kind == "one device"
    assert engine.description == "one device, 1 rank(s), cpu, float32"
    assert engine.num_parameters == sum(p.numel() for p in engine.model.parameters())


SEQUENCES = [
    (torch.arange(3, dtype=torch.int32).numpy(), torch.arange(4, 4 + n, dtype=torch.int32).numpy())
    for n in (2, 5, 3)
]


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_accumulated_micro_batches_make_the_step_of_one_big_batch(
    tiny_model: Path, max_grad_norm: float
) -> None:
    engine = tiny_engine(tiny_model, max_grad_norm=max_grad_norm)
    for index, sequence in enumerate(SEQUENCES):
        loss = -engine.score(sequence_batch([sequence])).sum() / 10
        engine.accumulate(loss, last=index == 2)
    norm = engine.update(0.01)

    model = load_model(ModelConfig(name_or_path=str(tiny_model), dtype="float32"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    total = torch.zeros(())
    for prompt, completion in SEQUENCES:
        ids = torch.cat([torch.from_numpy(prompt), torch.from_numpy(completion)]).long()
        logps = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        at = torch.arange(len(prompt) - 1, len(ids) - 1)
        total = total - logps[at, ids[at + 1]].sum() / 10
    total.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    expected_norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
    assert expected_norm > 1  # so that clipping matters
    if max_grad_norm:
        for gradient in gradients:
            gradient /= expected_norm
    optimizer.step()
    assert norm == pytest.approx(expected_norm, rel=1e-5)  # before clipping
    expected = model.state_dict()
    ids = torch.arange(20)[None]
    assert engine.weights().keys() == expected.keys()
    # Through the logits: Adam makes rounding errors of a gradient that is zero as large as any other step.
    with torch.no_grad():
        found, wanted = engine.model(ids).logits, model(ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_an_update_leaves_no_gradient_for_the_next_step(tiny_model: Path) -> None:
    norms = []
    engine = tiny_engine(tiny_model)
    for _ in range(2):
        engine.accumulate(-engine.score(sequence_batch(SEQUENCES)).sum(), last=True)
        norms.append(engine.update(0.0))  # a learning rate of 0: the same gradient again
    assert norms[0] == norms[1]


def test_scoring_alone_builds_no_graph(tiny_model: Path) -> None:
    engine = tiny_engine(tiny_model)
    batch = sequence_batch(SEQUENCES)
    assert engine.score(batch).requires_grad
    assert not engine.score_only(batch).requires_grad
    assert torch.equal(engine.score_only(batch), engine.score(batch).detach())


def test_exported_weights_have_the_models_own_names_and_the_compute_type(tiny_model: Path) -> None:
    engine = tiny_engine(tiny_model)
    bare = load_model(ModelConfig(name_or_path=str(tiny_model), dtype="float32")).state_dict()
    found = engine.weights()
    assert found.keys() == bare.keys()
    assert all(torch.equal(found[name], bare[name]) for name in bare)


def test_saved_state_comes_back(tiny_model: Path, tmp_path: Path) -> None:
    def step(engine: Engine) -> float:
        engine.accumulate(-engine.score(sequence_batch(SEQUENCES)).sum(), last=True)
        return engine.update(0.01)

    first = tiny_engine(tiny_model)
    step(first)
    first.save(tmp_path)
    second = tiny_engine(tiny_model)
    second.load(tmp_path)
    # Two more steps: the second of them shows whether the optimizer's state came along.
    assert [step(first), step(first)] == [step(second), step(second)]
    for name, weight in first.weights().items():
        assert torch.equal(weight, second.weights()[name])


def test_gradient_checkpointing_changes_no_gradient(tiny_model: Path) -> None:
    norms = []
    for checkpointing in (False, True):
        model = ModelConfig(
            name_or_path=str(tiny_model), dtype="float32", gradient_checkpointing=checkpointing
        )
        engine = Engine(engine_module.start(model), load_model(model), model, OptimizationConfig())
        engine.accumulate(-engine.score(sequence_batch(SEQUENCES)).sum(), last=True)
        norms.append(engine.update(0.01))
        assert engine.model.is_activation_checkpointing is checkpointing
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


def test_flex_attention_cannot_train_on_a_cpu_and_says_what_to_do(tiny_model: Path) -> None:
    config = ModelConfig(name_or_path=str(tiny_model), dtype="float32", attention="flex")
    with pytest.raises(UserError, match=r"model\.attention: flex; .* no backward pass on CPUs"):
        Engine(engine_module.start(config), load_model(config), config, OptimizationConfig())
