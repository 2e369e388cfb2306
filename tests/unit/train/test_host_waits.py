"""A micro-batch never makes the host wait for the device: forward pass, loss, metrics and backward pass run
on the *meta* device, where every wait raises.

The layout `rows` is left out: it runs transformers' own masks, which look at the positions once per pass.
"""

from contextlib import nullcontext
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from families import random_tree, tiny
from host_waits import NoCopiesToDevice
from torch.nn.attention import flex_attention

from dpo.config import LossConfig
from dpo.data.records import Pair, TokenizedGroup
from dpo.data.trees import Layout, TreeBatch, group_batch
from dpo.loss.catalog import LOSSES, NEEDS_SMOOTHING
from dpo.model import attention, varlen
from dpo.model.scorer import SequenceScorer
from dpo.tracking.metrics import MetricSums
from dpo.train import preference_objective
from dpo.train.next_token_objective import NextTokenObjective
from dpo.train.preference_objective import PreferenceObjective

LAYOUTS = [layout for layout in get_args(Layout) if layout != "rows"]
META = torch.device("meta")
CONFIGS = [
    *(LossConfig(type=name, label_smoothing=0.1 if name in NEEDS_SMOOTHING else 0) for name in LOSSES),
    LossConfig(ld_alpha=0.5),
    LossConfig(pair_weights="wpo"),
    *(LossConfig(f_divergence=name) for name in ("forward_kl", "js", "alpha")),
    LossConfig(type=["sigmoid", "simpo"], weights=[1.0, 0.5], sft_weight=0.1),
]


@pytest.fixture
def flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention on a device without kernels."""
    torch._dynamo.reset()
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    compiled = torch.compile(flex_attention.flex_attention, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(attention, "compiled_flex", compiled)


def batch_on_meta(scorer: SequenceScorer, layout: Layout, *, per_token: bool) -> TreeBatch:
    rng = np.random.default_rng(0)
    groups = []
    for number in (3, 2):
        prompt, completions = random_tree(rng, number)
        pairs = tuple(Pair(0, rejected) for rejected in range(1, number))
        groups.append(TokenizedGroup(prompt=prompt, completions=tuple(completions), pairs=pairs))
    batch = group_batch(groups, layout)
    batch = replace(
        batch,
        reference=torch.zeros(len(batch.targets if per_token else batch.num_tokens), dtype=torch.float64),
        pair_weights=torch.ones(len(batch.pairs), dtype=torch.float64),
        loss_count=3.0,
        mismatched=torch.tensor([2, 4]),
        quantiles=torch.full(batch.num_tokens.shape, 0.5, dtype=torch.float64),
    )
    return batch.to(META, scorer.windows)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text"])  # gemma has windows
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # torch's own
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's own
@pytest.mark.usefixtures("flex")
def test_a_scored_micro_batch_and_its_backward_pass(
    family: str, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "_kernel_takes", lambda query: True)  # as on a GPU
    scorer = SequenceScorer(tiny(family).to("meta"), flex=True)
    batch = batch_on_meta(scorer, layout, per_token=False)
    with nullcontext() if layout == "flex" else NoCopiesToDevice():  # nothing is compiled under such a mode
        loss = NextTokenObjective(dataset=None).loss(scorer(batch), batch, MetricSums())  # type: ignore[arg-type]
        loss.backward()
    assert all(parameter.grad is not None for parameter in scorer.model.base_model.parameters())


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.type} {config.ld_alpha or ''}")
def test_every_loss_its_metrics_and_its_backward_pass(
    config: LossConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gathering the whole step from all ranks waits, once per step; that is left out."""
    monkeypatch.setattr(preference_objective, "over_ranks", lambda policy: (policy, 0))
    scorer = SequenceScorer(tiny("gpt2").to("meta"))
    batch = batch_on_meta(scorer, "packed", per_token=config.ld_alpha is not None)
    objective = PreferenceObjective(data=None, loss_config=config, dtype="float32")  # type: ignore[arg-type]
    objective.loss_sums = {}
    with NoCopiesToDevice():
        logps = scorer(batch, per_token=objective.per_token, aligned=objective.aligned)
        objective.loss(logps, batch, MetricSums()).backward()


def test_what_would_wait_is_noticed() -> None:
    on_device = torch.ones(3, device=META)
    with NoCopiesToDevice():
        on_device * 2 + torch.full((), 1.0, device=META)
        for wait in (
            lambda: on_device.sum().item(),
            lambda: on_device[on_device > 0],
            lambda: torch.unique(on_device),
            lambda: torch.tensor(1.0, device=META),
            lambda: torch.ones(3).to(META),
            lambda: on_device[torch.zeros(1, dtype=torch.int64)],
        ):
            with pytest.raises((RuntimeError, AssertionError, NotImplementedError)):
                wait()
