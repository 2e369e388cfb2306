"""The balancing loss is the family's own on separate rows, in every layout; experts are counted as used."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import random_ids
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.tiny_models import tiny_config, tiny_model
from dpo.config import ModelConfig
from dpo.data.trees import Layout, Tree, TreeBatch, tree_batch
from dpo.engine.scoring import make_scorer
from dpo.errors import UserError
from dpo.model.attention import written
from dpo.model.authors import remove_noise
from dpo.model.load import ready
from dpo.model.lora import check_policy
from dpo.model.recomputation import recompute
from dpo.model.routers import Routed, Routers, balancing_loss, check_balancing
from dpo.model.scorer import SequenceScorer

RNG = np.random.default_rng(0)
TREES: list[Tree] = [
    (random_ids(RNG, 5), [random_ids(RNG, 7), random_ids(RNG, 3), random_ids(RNG, 4)]),
    (random_ids(RNG, 9), [random_ids(RNG, 2)]),
]
TOP_K = 2
BALANCED = ("mixtral", "qwen3_moe", "qwen2_moe", "gpt_oss", "olmoe")


def model_of(family: str) -> PreTrainedModel:
    config = tiny_config(family)
    remove_noise(config)
    return ready(tiny_model(family, config))


def scorer_of(model: PreTrainedModel) -> SequenceScorer:
    return make_scorer(model, ModelConfig(name_or_path="", dtype="float32"))


def watched(scorer: SequenceScorer, batch: TreeBatch, **options: Any) -> Routed:
    routers = Routers(scorer.model, balanced=True)
    with routers.watching(batch) as routed:
        scorer(batch, **options)
    return routed


def loss_of(*parts: Routed) -> Tensor:
    """The balancing loss of batches together."""
    balances = [part.balance for part in parts if part.balance is not None]
    picks, probabilities, num_tokens = (
        sum(getattr(balance, name) for balance in balances)
        for name in ("picks", "probabilities", "num_tokens")
    )
    assert isinstance(num_tokens, Tensor)
    return balancing_loss(picks, probabilities, num_tokens)


def own_loss(model: PreTrainedModel) -> Tensor:
    """As transformers computes it on padded rows."""
    rows = tree_batch(TREES, "rows")
    mask = (rows.num_readers > 0).long()
    with written(model):
        out = model(input_ids=rows.input_ids, attention_mask=mask, output_router_logits=True)
    loss: Tensor = out.aux_loss
    return loss


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    moved = {name for name, gradient in expected.items() if gradient.abs().max() > 0}
    assert any("gate" in name or "router" in name for name in moved)
    for name in moved:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", BALANCED)
def test_it_is_the_familys_own_loss_in_every_layout(family: str) -> None:
    model = model_of(family)
    scorer = scorer_of(model)
    expected = gradients(model, own_loss(model))
    for layout in scorer.layouts:
        if layout == "packed" and family == "gpt_oss":
            continue  # its sinks rule it out
        routed = watched(scorer, tree_batch(TREES, layout))
        assert_same(gradients(model, loss_of(routed)), expected)


def test_parts_of_a_tree_add_up_to_it() -> None:
    model = model_of("mixtral")
    scorer, (prompt, completions) = scorer_of(model), TREES[0]
    cut: list[list[Tree]] = [[(prompt, completions[:2])], [(prompt, completions[2:]), TREES[1]], []]
    parts = [watched(scorer, tree_batch(trees, "packed")) for trees in cut]
    assert loss_of(*parts).item() == pytest.approx(own_loss(model).item(), rel=1e-5)
    whole = watched(scorer, tree_batch(TREES, "packed"))
    torch.testing.assert_close(sum(part.load for part in parts), whole.load)
    assert parts[2].load.sum() == 0  # a rank without work


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_recomputed_activations_give_the_same_gradient(kind: str) -> None:
    model = model_of("mixtral")
    scorer = scorer_of(model)
    expected = gradients(model, own_loss(model))
    recompute(model, kind)  # type: ignore[arg-type]
    model.train()
    again = gradients(model, loss_of(watched(scorer, tree_batch(TREES, "packed"))))
    assert_same(again, expected)


@pytest.mark.parametrize("layout", ["trees", "rows"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_every_token_of_every_sequence_is_counted_once_a_layer(family: str, layout: Layout) -> None:
    scorer, batch = scorer_of(model_of(family)), tree_batch(TREES, layout)
    routers = Routers(scorer.model)
    with routers.watching(batch) as routed:
        scorer(batch)
    assert routed.balance is None
    layers = routed.load.split(routers.num_experts)
    assert {layer.sum().item() for layer in layers} == {TOP_K * batch.num_row_tokens}
    assert len(layers) == (1 if family == "deepseek_v3" else 2)  # its first layer is dense


def test_rows_one_at_a_time_are_counted_alike() -> None:
    scorer, batch = scorer_of(model_of("mixtral")), tree_batch(TREES, "rows")
    together, alone = watched(scorer, batch), watched(scorer, batch, one_at_a_time=True)
    torch.testing.assert_close(alone.load, together.load)
    assert loss_of(alone).item() == pytest.approx(loss_of(together).item(), rel=1e-5)


def test_the_balanced_loss_is_the_number_of_picks() -> None:
    even = torch.full((4,), 5.0)
    assert balancing_loss(2 * even, even, torch.tensor(20.0)).item() == TOP_K


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "glm4_moe"])
def test_a_family_without_a_balancing_loss_is_refused(family: str) -> None:
    model = model_of(family)
    for refused in (lambda: Routers(model, balanced=True), lambda: check_balancing(model.config)):
        with pytest.raises(UserError, match=r"router_aux_loss_weight: .*has no load-balancing loss") as error:
            refused()
        assert "\n" not in str(error.value)


def test_check_refuses_such_a_family_by_its_configuration(tmp_path: Path) -> None:
    for family in ("llama", "mixtral"):
        tiny_config(family).save_pretrained(tmp_path / family)
    options = {"dtype": "float32", "router_aux_loss_weight": 0.01}
    check_policy(ModelConfig(name_or_path=str(tmp_path / "mixtral"), **options), local=True)
    with pytest.raises(UserError, match="LlamaForCausalLM has no load-balancing loss"):
        check_policy(ModelConfig(name_or_path=str(tmp_path / "llama"), **options), local=True)


def test_other_forms_of_the_loss_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.mixtral import modeling_mixtral

    monkeypatch.setattr(modeling_mixtral, "load_balancing_loss_func", lambda *_: torch.tensor(1.0))
    with pytest.raises(UserError, match="not a product of two means"):
        Routers(model_of("mixtral"), balanced=True)


def test_a_model_without_experts_is_not_watched() -> None:
    scorer, batch = scorer_of(model_of("llama")), tree_batch(TREES, "packed")
    with Routers(scorer.model).watching(batch) as routed:
        scorer(batch)
    assert not routed.load.numel()
