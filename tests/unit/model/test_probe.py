"""The probe: families that can share prompts do, others fall back to rows, and wrong numbers are noticed."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from families import ROWS, TREES, naive_logps, random_tree, tiny
from torch import Tensor

from dpo.data.trees import tree_batch
from dpo.model.probe import Probed, probe
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


class Halved(torch.nn.Module):
    def __init__(self, head: torch.nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = head.weight, head.bias

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight) / 2
