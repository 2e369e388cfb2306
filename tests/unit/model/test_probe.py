"""The probe: families that can share prompts do, others fall back to rows, and wrong numbers are noticed."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from families import ROWS, TREES, naive_logps, random_tree, tiny
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dpo.data.trees import TreeBatch, tree_batch
from dpo.model.attention import TreeAttention
from dpo.model.first_blocks import first_blocks
from dpo.model.load import ready
from dpo.model.probe import LEAST_NOISE, NOISE_FACTOR, TOLERANCE, Probed, probe
from dpo.model.scorer import SequenceScorer


@pytest.mark.parametrize("family", TREES)
def test_a_family_that_can_share_prompts_does(family: str) -> None:
    probed = probed_layout(family)
    packs = family not in ("falcon", "gemma2")  # own attention code; soft-capped scores
    assert probed == Probed(layout="packed" if packs else "trees", uses_projection=True, notes=())


@pytest.mark.parametrize("family", ROWS)
def test_a_family_that_cannot_falls_back_to_rows_with_a_note(family: str) -> None:
    probed = probed_layout(family)
    assert (probed.layout, probed.uses_projection) == ("rows", True)
    (note,) = probed.notes
    assert "cannot share a prompt" in note
    rng = np.random.default_rng(0)
    trees, scorer = [random_tree(rng, 3), random_tree(rng, 2)], SequenceScorer(tiny(family))
    with torch.no_grad():
        found = scorer(tree_batch(trees, "rows"), per_token=True)
        torch.testing.assert_close(found, naive_logps(tiny(family), trees), rtol=1e-5, atol=5e-5)


def probed_layout(family: str) -> Probed:
    scorer = SequenceScorer(tiny(family))
    longest = random_tree(np.random.default_rng(0), 3)
    device = torch.device("cpu")
    return probe(scorer, scorer.layouts, longest, dtype=torch.float32, device=device)


def test_layouts_that_give_other_log_probs_are_not_used() -> None:
    class Forgetful(SequenceScorer):
        """As if it attended to the other completions of its tree, in every layout but rows."""

        def forward(self, batch, **options):  # type: ignore[no-untyped-def]
            found = super().forward(batch, **options)
            return found + 0.01 * (batch.layout != "rows")

    scorer = Forgetful(tiny("llama"))
    longest = random_tree(np.random.default_rng(0), 3)
    cpu = torch.device("cpu")
    probed = probe(scorer, scorer.layouts, longest, dtype=torch.float32, device=cpu)
    assert probed.layout == "rows"
    assert [note.split(":")[0] for note in probed.notes] == [
        "layout packed is not used",
        "layout trees is not used",
    ]
    assert "0.01 nats" in probed.notes[0]


def test_a_projection_that_ours_does_not_reproduce_is_left_to_the_model() -> None:
    model = tiny("llama")
    head = model.lm_head
    model.lm_head = Halved(head)  # unknown to us: it halves its logits
    scorer = SequenceScorer(model)
    longest = random_tree(np.random.default_rng(0), 3)
    cpu = torch.device("cpu")
    probed = probe(scorer, scorer.layouts, longest, dtype=torch.float32, device=cpu)
    assert (probed.layout, probed.uses_projection) == ("packed", False)
    assert probed.notes[0].startswith("the model's own output projection is used")
    scorer.uses_projection = False
    with torch.no_grad():
        found = scorer(tree_batch([longest], "packed"), per_token=True)
        torch.testing.assert_close(found, naive_logps(model, [longest]), rtol=1e-5, atol=2e-5)


def in_bfloat16(scorer: SequenceScorer) -> Probed:
    longest = random_tree(np.random.default_rng(0), 3)
    cpu, precise = torch.device("cpu"), first_blocks(scorer)
    return probe(scorer, scorer.layouts, longest, dtype=torch.bfloat16, device=cpu, precise=precise)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gemma2", "gemma3_text", "mixtral"])
def test_in_bfloat16_layouts_are_those_of_float32(family: str) -> None:
    assert in_bfloat16(SequenceScorer(tiny(family).bfloat16())) == probed_layout(family)


def test_in_bfloat16_a_hidden_token_is_noticed_where_it_changes_less_than_rounding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scorer = SequenceScorer(mild("llama").bfloat16())

    def first_token_hidden(
        tree: TreeAttention, num_queries: int, num_keys: int, window: int | None
    ) -> Tensor:
        distance = torch.arange(num_queries)[:, None] + num_keys - num_queries - torch.arange(num_keys)
        return (distance >= 0) & ((torch.arange(num_keys) > 0) | (distance == 0))

    assert in_bfloat16(scorer).layout == "packed"
    monkeypatch.setattr(TreeAttention, "mask", first_token_hidden)
    probed = in_bfloat16(scorer)
    assert probed.layout == "trees"
    difference = float(probed.notes[0].split("differ by ")[1].split()[0])
    assert TOLERANCE < difference < NOISE_FACTOR * LEAST_NOISE  # in bfloat16 it would pass for noise


def test_in_bfloat16_a_model_that_only_goes_wrong_as_a_whole_is_noticed() -> None:
    scorer = SequenceScorer(mild("llama").bfloat16())

    class Wrong(torch.nn.Module):
        def forward(self, batch: TreeBatch, **options: bool) -> Tensor:
            found: Tensor = scorer(batch, **options)
            return found + 0.5 * (batch.layout != "rows")

    longest = random_tree(np.random.default_rng(0), 3)
    cpu, precise = torch.device("cpu"), first_blocks(scorer)
    probed = probe(Wrong(), scorer.layouts, longest, dtype=torch.bfloat16, device=cpu, precise=precise)
    assert probed.layout == "rows"
    assert "noise is" in probed.notes[0]


def mild(family: str) -> PreTrainedModel:
    """With weights as transformers makes them: one token more or less changes little."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**TREES[family], "initializer_range": 0.02})
    return ready(AutoModelForCausalLM.from_config(config))


class Halved(torch.nn.Module):
    def __init__(self, head: torch.nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = head.weight, head.bias

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight) / 2
