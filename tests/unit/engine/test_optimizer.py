"""Schedules and optimizers by hand."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from dpo.config import OptimizationConfig, SftTrainConfig
from dpo.engine.optimizer import OPTIMIZERS, check_optimizer, make_optimizer, state_bytes, typical_state_bytes
from dpo.engine.schedule import learning_rate
from dpo.errors import UserError

PAGES_ON_A_GPU = "ignore:Paged optimizers are not supported on CPU:UserWarning"


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


def test_a_warm_up_may_be_a_share_of_the_run_rounded_up() -> None:
    assert rates(10, warmup_ratio=0.4)[:6] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert rates(9, warmup_ratio=0.4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates(100, warmup_ratio=0.07)[5:8] == pytest.approx([6 / 7, 1.0, 1.0])  # 0.07 * 100 is above 7
    assert rates(5, warmup_ratio=0.0) == [1.0] * 5


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_decay_ends_at_the_least_rate_one_step_after_the_last(schedule: str) -> None:
    plain = rates(10, schedule=schedule, warmup_ratio=0.2)
    found = rates(10, schedule=schedule, warmup_ratio=0.2, min_learning_rate=0.1)
    assert found[:2] == plain[:2] == [0.5, 1.0]  # the warm-up starts from 0
    assert found[2:] == pytest.approx([0.1 + 0.9 * rate for rate in plain[2:]])
    options = OptimizationConfig(learning_rate=1.0, schedule=schedule, min_learning_rate=0.1, warmup_steps=0)  # type: ignore[arg-type]
    assert learning_rate(11, 10, options) == pytest.approx(0.1)


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
    options = OptimizationConfig(adam_betas=(0.8, 0.95), adam_epsilon=1e-5, learning_rate=0.5)
    optimizer = make_optimizer(Small(), options)
    assert isinstance(optimizer, torch.optim.AdamW)
    expected = {"betas": (0.8, 0.95), "eps": 1e-5, "lr": 0.5}
    assert all(expected.items() <= group.items() for group in optimizer.param_groups)


def test_rmsprop_is_the_papers() -> None:
    optimizer = make_optimizer(Small(), OptimizationConfig(optimizer="rmsprop", weight_decay=0.1))
    assert isinstance(optimizer, torch.optim.RMSprop)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
    assert all(g["alpha"] == 0.99 for g in optimizer.param_groups)


def test_a_module_without_matrices_has_no_empty_group() -> None:
    assert len(make_optimizer(nn.LayerNorm(2), OptimizationConfig()).param_groups) == 1


def stepped(module: nn.Module, gradients: list[list[float]], **options: Any) -> list[float]:
    """A vector of zeros after a step with each gradient."""
    module.register_parameter("only", nn.Parameter(torch.zeros(len(gradients[0]))))
    optimizer = make_optimizer(module, OptimizationConfig(**options))
    for gradient in gradients:
        module.only.grad = torch.tensor(gradient)
        optimizer.step()
    return [round(value, 6) for value in module.only.tolist()]


def test_lion_by_hand() -> None:
    # m = 0, then 0.01 g: the first update is sign(0.1 g). In the second, 0.9 m + 0.1 g: for the first number
    # 0.9 * 0.03 - 0.1 * 0.2 > 0, for the second 0.9 * 0.03 - 0.1 * 0.3 < 0.
    found = stepped(nn.Module(), [[3.0, 3.0, -1.0], [-0.2, -0.3, -1.0]], optimizer="lion", learning_rate=0.5)
    assert found == [-1.0, 0.0, 1.0]


def test_lions_weight_decay_is_decoupled() -> None:
    weight = nn.Linear(1, 1, bias=False)
    nn.init.constant_(weight.weight, 4.0)
    options = OptimizationConfig(optimizer="lion", learning_rate=0.5, weight_decay=0.25)
    optimizer = make_optimizer(weight, options)
    weight.weight.grad = torch.ones(1, 1)
    optimizer.step()
    assert weight.weight.item() == pytest.approx(4.0 * (1 - 0.5 * 0.25) - 0.5)


def test_adafactors_steps_are_not_scaled_by_its_weights_or_by_time() -> None:
    # Its first update of a vector is g / |g|, whatever the weights (zeros here) are.
    assert stepped(nn.Module(), [[3.0, -2.0]], optimizer="adafactor", learning_rate=0.5) == [-0.5, 0.5]


def small_gpt2() -> GPT2LMHeadModel:
    sizes = {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 300, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest() -> None:
    model = small_gpt2()
    optimizer = make_optimizer(model, OptimizationConfig(optimizer="muon", weight_decay=0.1))
    names = {parameter: name for name, parameter in model.named_parameters()}
    taken = [{names[p] for p in group["params"]} for group in optimizer.param_groups]
    kinds = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert taken[0] == {f"transformer.h.{block}.{kind}.weight" for block in range(2) for kind in kinds}
    assert taken[1] == {"transformer.wte.weight", "transformer.wpe.weight"}
    assert set().union(*taken) == set(names.values())
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]
    torch.manual_seed(0)
    for weight in model.parameters():
        weight.grad = torch.randn_like(weight)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer.step()
    moved = {name: weight.detach() - before[name] for name, weight in model.named_parameters()}
    matrix = "transformer.h.0.mlp.c_fc.weight"
    # A matrix whose singular values are about 1, times 0.2 sqrt(256): Newton-Schulz ends between 0.6 and 1.2.
    values = torch.linalg.svdvals(moved[matrix] + 1e-3 * 0.1 * before[matrix]) / (1e-3 * 0.2 * 16)
    assert 0.6 < float(values.min()) < float(values.max()) < 1.3
    # The first step of AdamW moves each number by the learning rate.
    assert moved["transformer.ln_f.weight"].abs().max() == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.filterwarnings(PAGES_ON_A_GPU)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_bytes_of_the_state_are_those_that_are_kept(name: str) -> None:
    model = small_gpt2()
    optimizer = make_optimizer(model, OptimizationConfig(optimizer=name))  # type: ignore[arg-type]
    model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    kept = {
        id(tensor): tensor
        for state in optimizer.state.values()
        for tensor in state.values()
        if isinstance(tensor, torch.Tensor) and tensor.numel() > 1
    }  # not counters of steps
    maps = 2 * 256 * 4 if name.endswith("8bit") else 0  # of all weights together
    assert sum(t.numel() * t.itemsize for t in kept.values()) == state_bytes(model, name) + maps


def test_a_large_model_keeps_per_parameter() -> None:
    found = {name: round(typical_state_bytes(name), 2) for name in OPTIMIZERS}
    assert found == {
        "adamw": 8, "rmsprop": 4, "lion": 4, "adafactor": 0, "muon": 4,
        "adamw_8bit": 2.03, "paged_adamw": 8, "paged_adamw_8bit": 2.03,
    }  # fmt: skip


def refusal(*, zero: dict[str, Any] | None = None, **options: Any) -> str:
    deepspeed = None if zero is None else {"zero_optimization": zero}
    try:
        check_optimizer(OptimizationConfig(**options), deepspeed)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_cannot_be_sharded_is_refused_in_one_line(name: str) -> None:
    assert refusal(optimizer=name) == ""
    for stage in (0, 2, 3):
        found = refusal(optimizer=name, zero={"stage": stage})
        assert (found == "") == (name in ("adamw", "rmsprop", "lion"))
        assert "\n" not in found
    offloaded = refusal(optimizer=name, zero={"stage": 3, "offload_optimizer": {"device": "cpu"}})
    assert (offloaded == "") == (name == "adamw")


def test_options_that_an_optimizer_does_not_use_are_refused() -> None:
    for name in OPTIMIZERS:
        said = refusal(optimizer=name, adam_epsilon=1e-6)
        expected = (
            "" if "adam" in name or name == "muon" else f"train.adam_epsilon: 1e-06; {name} does not use"
        )
        assert said.startswith(expected)
        assert bool(said) == bool(expected)
    assert "train.adam_betas" in refusal(optimizer="lion", adam_betas=(0.9, 0.98))
    check_optimizer(SftTrainConfig(optimizer="lion"), None)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo.engine.optimizer.find_spec", lambda name: None)
    found = refusal(optimizer="adamw_8bit")
    assert "pip install" in found
    assert "bitsandbytes" in found
    assert refusal(optimizer="adamw") == ""
