"""The balancing loss in training: one gradient whatever the budget; the experts' load over real tokens."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast
from unit.train.runs import Trained, assert_resumed_alike, changed

from benchmarks.tiny_models import tiny_config, tiny_model
from dpo.config import Config
from dpo.data.dataset import TokenizedDataset
from dpo.engine import engine as engine_module
from dpo.errors import UserError
from dpo.model.routers import Routed
from dpo.train.routing import routing_metrics

VALUE = -20.0
MOE_METRICS = {"train/router/max_load", "train/router/unused_experts"}


@pytest.fixture
def with_experts(
    experiment: Config, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Callable[..., Config]:
    """The experiment with a family of experts: with_experts("mixtral", weight=1.0)."""

    def make(family: str, *, weight: float = 0.0) -> Config:
        folder = tmp_path / family
        if not folder.exists():
            tiny_model(family, tiny_config(family, vocab_size=len(tokenizer))).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        model = replace(experiment.model, name_or_path=str(folder), router_aux_loss_weight=weight)
        return replace(experiment, model=model)

    return make


@pytest.fixture
def values(experiment: Config, open_data: Callable[[Config], TokenizedDataset]) -> np.ndarray:
    return np.full(len(open_data(experiment).keys), VALUE)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_the_balancing_loss_does_not_depend_on_micro_batches(
    with_experts: Callable[..., Config], run: Trained, values: np.ndarray, family: str
) -> None:
    config = with_experts(family, weight=5.0)
    runs = [
        run(changed(config, f"of{budget}", max_tokens_per_micro_batch=budget, max_steps=3), reference=values)
        for budget in (24, 100_000)
    ]
    cut, whole = (trained.lines() for trained in runs)
    for line, other in zip(cut, whole, strict=True):
        assert MOE_METRICS | {"train/router/aux_loss"} <= line.keys()
        for key, found in line.items():
            assert found == pytest.approx(other[key], rel=5e-5, abs=2e-6), key
    without = run(
        changed(with_experts(family), "without", backward="cached", max_steps=3), reference=values
    ).lines()
    assert without[0]["train/loss"] == pytest.approx(whole[0]["train/loss"], rel=1e-6)
    assert without[0]["train/grad_norm"] != pytest.approx(whole[0]["train/grad_norm"], rel=1e-2)


def test_training_balances_what_it_is_asked_to(
    with_experts: Callable[..., Config], run: Trained, values: np.ndarray
) -> None:
    options = {"learning_rate": 1e-2, "num_epochs": 10, "max_steps": 20}
    balanced, free = (
        run(changed(with_experts("mixtral", weight=weight), str(weight), **options), reference=values)
        for weight in (100.0, 1e-9)
    )
    excess, usual = (trained.curve("train/router/aux_loss")[-1] - 2 for trained in (balanced, free))
    assert excess < 0.5 * usual


def test_a_resumed_run_balances_alike(
    with_experts: Callable[..., Config], experiment: Config, run: Trained, values: np.ndarray
) -> None:
    options = {"checkpoint_every": 2, "evaluate_every": 1}
    config = with_experts("mixtral", weight=1.0)

    def run_it(config: Config, **more: object) -> object:
        return run(config, reference=values, **more)

    whole = run_it(changed(config, "whole", **options), evaluation=float)
    assert_resumed_alike(run_it, changed(config, "killed", **options), whole)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_the_load_is_recorded_without_a_loss_in_either_way_of_a_step(
    with_experts: Callable[..., Config], run: Trained, values: np.ndarray, family: str
) -> None:
    config = with_experts(family)
    direct, cached = (
        run(changed(config, way, backward=way, max_tokens_per_micro_batch=40, max_steps=2), reference=values)
        for way in ("direct", "cached")
    )
    for name in MOE_METRICS:
        assert direct.curve(name) == pytest.approx(cached.curve(name), rel=1e-6)
        assert direct.curve(name)
    assert all(1 <= load <= 4 for load in direct.curve("train/router/max_load"))
    assert not direct.curve("train/router/aux_loss")


@pytest.mark.parametrize("family", ["gpt2", "deepseek_v3"])
def test_a_model_that_has_no_such_loss_is_refused_before_the_first_step(
    experiment: Config,
    with_experts: Callable[..., Config],
    run: Trained,
    values: np.ndarray,
    family: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = replace(experiment.model, router_aux_loss_weight=1.0)
    config = replace(experiment, model=model) if family == "gpt2" else with_experts(family, weight=1.0)
    monkeypatch.setattr(engine_module, "make_scorer", None)
    with pytest.raises(UserError, match="has no load-balancing loss"):
        run(config, reference=values)


def test_metrics_are_of_sums_over_micro_batches() -> None:
    loads = [[4.0, 0.0, 1.0, 3.0, 0.0], [2.0, 0.0, 3.0, 1.0, 0.0]]  # layers of 2 and 3 experts
    found = routing_metrics([Routed(load=torch.tensor(load)) for load in loads], [2, 3])
    assert found["router/max_load"] == pytest.approx((6 / 3 + 4 / (8 / 3)) / 2)
    assert found["router/unused_experts"] == pytest.approx(2 / 5)
    assert routing_metrics([Routed(load=torch.zeros(0))], []) == {}
