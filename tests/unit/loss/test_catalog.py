"""The catalog of losses: every problem with the options at once, what a loss needs, and its title."""

from dataclasses import replace
from typing import Any

import pytest

from dpo.cli.validate import problems
from dpo.config import Config, DataConfig, LossConfig, ModelConfig
from dpo.loss.catalog import LOSSES, averaged_over_groups, loss_problems, needs_reference, title_of

CONFIG = Config(model=ModelConfig(name_or_path="m"), data=DataConfig(train="d"))


def keys(**options: Any) -> list[str]:
    config = replace(CONFIG, loss=LossConfig(**options))
    return [problem.split(":")[0] for problem in problems(config)]


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"exo_pair", "robust"}))
def test_every_loss_is_legal_with_the_defaults(name: str) -> None:
    assert keys(type=name) == []


@pytest.mark.parametrize("name", ["exo_pair", "robust"])
def test_some_losses_need_smoothing(name: str) -> None:
    (problem,) = loss_problems(LossConfig(type=name))
    assert problem.startswith(f"loss.label_smoothing: 0; {name}")
    assert keys(type=name, label_smoothing=0.001) == []


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"type": "dpo"}, "loss.type"),
        ({"type": []}, "loss.type"),
        ({"type": ["ipo", "ipo"]}, "loss.type"),
        ({"beta": 0.0}, "loss.beta"),
        ({"beta": float("nan")}, "loss.beta"),
        ({"label_smoothing": 0.5}, "loss.label_smoothing"),
        ({"label_smoothing": -0.1}, "loss.label_smoothing"),
        ({"type": "discopop", "discopop_tau": 1.0}, "loss.discopop_tau"),
        ({"type": "simpo", "simpo_gamma": -1.0}, "loss.simpo_gamma"),
        ({"sft_weight": -1.0}, "loss.sft_weight"),
        ({"ld_alpha": 1.5}, "loss.ld_alpha"),
        ({"type": ["ipo", "hinge"], "weights": [1.0]}, "loss.weights"),
        ({"type": ["ipo", "hinge"], "weights": [1.0, 0.0]}, "loss.weights"),
        ({"weights": [1.0, 2.0]}, "loss.weights"),
        ({"type": "ipo", "label_smoothing": 0.1}, "loss.label_smoothing"),
        ({"type": "sigmoid", "simpo_gamma": 1.0}, "loss.simpo_gamma"),
        ({"type": "hinge", "discopop_tau": 0.1}, "loss.discopop_tau"),
        ({"type": "simpo", "ld_alpha": 0.5}, "loss.ld_alpha"),
        ({"type": "sigmoid_norm", "ld_alpha": 0.5}, "loss.ld_alpha"),
        ({"type": ["plackett_luce", "sigmoid"]}, "loss.type"),
        ({"type": "plackett_luce", "pair_weights": "score_margin"}, "loss.pair_weights"),
        ({"type": "plackett_luce", "sft_weight": 0.5}, "loss.sft_weight"),
        ({"type": "nca_pair", "f_divergence": "js"}, "loss.f_divergence"),
        ({"type": "sigmoid", "f_alpha": 0.2}, "loss.f_alpha"),
        ({"type": "sigmoid", "f_divergence": "alpha", "f_alpha": 1.0}, "loss.f_alpha"),
        ({"type": "aot", "pair_weights": "wpo"}, "loss.pair_weights"),
        ({"type": "sigmoid", "pair_weights": "wpo", "ld_alpha": 0.5}, "loss.ld_alpha"),
        ({"type": ["sigmoid", "bco_pair"], "pair_weights": "wpo"}, "loss.pair_weights"),
        ({"type": "ipo_norm", "ld_alpha": 0.5}, "loss.ld_alpha"),
        ({"type": "sft", "beta": 0.2}, "loss.beta"),
        ({"type": "kto", "ld_alpha": 0.5}, "loss.ld_alpha"),
        ({"type": "kto", "pair_weights": "score_margin"}, "loss.pair_weights"),
        ({"type": "kto", "desirable_weight": 0.0}, "loss.desirable_weight"),
        ({"type": "bco_pair", "undesirable_weight": 2.0}, "loss.undesirable_weight"),
        ({"type": ["sigmoid", "sft"], "sft_weight": 0.5}, "loss.sft_weight"),
    ],
)
def test_an_illegal_or_unused_option_is_named(options: dict[str, Any], key: str) -> None:
    assert keys(**options) == [key]


def test_an_unused_option_is_named_with_the_losses() -> None:
    (problem,) = loss_problems(LossConfig(type=["ipo", "hinge"], label_smoothing=0.1))
    assert problem.startswith("loss.label_smoothing: 0.1; ipo, hinge")


def test_an_option_of_one_loss_of_a_mixture_is_used() -> None:
    assert keys(type=["sigmoid", "ipo"], label_smoothing=0.1) == []
    assert keys(type=["sigmoid", "nca_pair"], f_divergence="js") == []


@pytest.mark.parametrize("name", ["aot", "aot_unpaired", "kto"])
def test_a_loss_that_compares_the_step_needs_more_than_one_pair(name: str) -> None:
    config = replace(CONFIG, loss=LossConfig(type=name), train=replace(CONFIG.train, pairs_per_step=1))
    (problem,) = problems(config)
    assert problem == (
        f"train.pairs_per_step: 1; {name} compares the pairs of a step: expected at least 2, and far more"
    )


def test_problems_come_with_those_of_other_sections_at_once() -> None:
    config = replace(CONFIG, loss=LossConfig(type="ipo", beta=-1, label_smoothing=0.1))
    config = replace(config, train=replace(config.train, seed=-1))
    assert sorted(problem.split(":")[0] for problem in problems(config)) == [
        "loss.beta",
        "loss.label_smoothing",
        "train.seed",
    ]


def test_a_ranking_needs_whole_groups() -> None:
    config = replace(CONFIG, loss=LossConfig(type="plackett_luce"))
    assert problems(config) == []
    split = replace(config, data=replace(config.data, group_pairs=False))
    assert [problem.split(":")[0] for problem in problems(split)] == ["data.group_pairs"]


def test_what_a_loss_needs() -> None:
    assert [name for name in LOSSES if not needs_reference(LossConfig(type=name))] == ["simpo", "orpo", "sft"]
    assert needs_reference(LossConfig(type=["simpo", "ipo"]))
    assert not needs_reference(LossConfig(type=["simpo", "orpo"]))
    assert [name for name in LOSSES if averaged_over_groups(LossConfig(type=name))] == ["plackett_luce"]


@pytest.mark.parametrize(
    ("options", "title"),
    [
        ({}, "sigmoid, beta 0.1, label smoothing 0"),
        ({"type": "ipo", "beta": 0.05}, "ipo, beta 0.05"),
        ({"type": "simpo", "beta": 2.0}, "simpo, beta 2, simpo gamma 0.5"),
        (
            {"type": ["ipo", "hinge"], "weights": [1.0, 0.5], "sft_weight": 1.0},
            "1 ipo + 0.5 hinge, beta 0.1, sft weight 1.0",
        ),
        (
            {"f_divergence": "alpha", "f_alpha": 0.25},
            "sigmoid, beta 0.1, label smoothing 0, f alpha 0.25, f divergence alpha",
        ),
    ],
)
def test_a_title_has_every_option_that_is_used(options: dict[str, Any], title: str) -> None:
    assert title_of(LossConfig(**options)) == title
