"""The probe: families that share prompts exactly do, others get rows, and what cannot be exact is refused."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from families import ROWS, TREES, naive_logps, random_ids, random_tree, tiny
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo.data.dataset import map_dataset, write_dataset
from dpo.data.records import TokenizedGroup
from dpo.data.trees import Tree, TreeBatch, tree_batch
from dpo.model.probe import LOOKS_AHEAD, MOST_TOLERANCE, TOLERANCE, Comparison, Probed, Score, probe
from dpo.model.probe_trees import probe_trees, trees_of
from dpo.model.scorer import SequenceScorer

LONGEST = random_tree(np.random.default_rng(0), 3)
CPU = torch.device("cpu")


def probed(scorer: SequenceScorer, longest: Tree = LONGEST, score: Score | None = None) -> Probed:
    trees = trees_of(longest)
    compared = [Comparison(score or scorer, part, device=CPU) for part in (trees.short, trees.long)]
    return probe(scorer.layouts, compared)


@pytest.mark.parametrize("family", TREES)
def test_a_family_that_can_share_prompts_does(family: str) -> None:
    packs = family not in ("falcon", "gemma2")  # own attention code; soft-capped scores
    found = probed(SequenceScorer(tiny(family)))
    assert found == Probed(layout="packed" if packs else "trees", uses_projection=True, notes=())


@pytest.mark.parametrize("family", ROWS)
def test_a_family_that_cannot_falls_back_to_rows_with_a_note(family: str) -> None:
    found = probed(SequenceScorer(tiny(family)))
    assert (found.layout, found.uses_projection, found.one_at_a_time) == ("rows", True, False)
    (note,) = found.notes
    assert "cannot share a prompt" in note
    rng = np.random.default_rng(0)
    trees, scorer = [random_tree(rng, 3), random_tree(rng, 2)], SequenceScorer(tiny(family))
    with torch.no_grad():
        logps = scorer(tree_batch(trees, "rows"), per_token=True)
        torch.testing.assert_close(logps, naive_logps(tiny(family), trees), rtol=1e-5, atol=5e-5)


class Replaced(nn.Module):
    """A block's MLP with something else added to it, along the row."""

    def __init__(self, mlp: nn.Module, added: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.mlp, self.added = mlp, added

    def forward(self, hidden: Tensor) -> Tensor:
        return self.mlp(hidden) + self.added(hidden)


def with_added(added: Callable[[Tensor], Tensor], *, block: int = 1) -> PreTrainedModel:
    model = tiny("llama")
    model.model.layers[block].mlp = Replaced(model.model.layers[block].mlp, added)
    return model


def state_of_the_row(hidden: Tensor) -> Tensor:
    """A short convolution, as in LFM2 or Mamba: it knows no segments, and only the first two tokens of a
    segment see another.
    """
    return 0.3 * (F.pad(hidden, (0, 0, 2, 0))[:, :-2] + F.pad(hidden, (0, 0, 1, 0))[:, :-1])


def test_state_that_leaks_across_segments_is_noticed_and_rows_are_exact() -> None:
    scorer = SequenceScorer(with_added(state_of_the_row))
    found = probed(scorer)
    assert found.layout == "rows"
    assert found.refusal is None
    assert [note.split(":")[0] for note in found.notes] == [
        "layout packed is not used",
        "layout trees is not used",
    ]
    trees = [LONGEST, random_tree(np.random.default_rng(1), 2)]
    with torch.no_grad():
        logps = scorer(tree_batch(trees, "rows"), per_token=True)
        torch.testing.assert_close(logps, naive_logps(scorer.model, trees), rtol=1e-5, atol=5e-5)


def test_state_that_leaks_from_one_document_to_the_next_is_noticed_where_trees_have_one_completion() -> None:
    """As in `dpo sft` on text: each tree is fine alone, two in a row are not."""
    rng = np.random.default_rng(0)
    document = random_ids(rng, 1), [random_ids(rng, 40)]
    assert probed(SequenceScorer(with_added(state_of_the_row)), document).layout == "trees"
    assert probed(SequenceScorer(tiny("llama")), document).layout == "packed"


def test_a_leak_that_a_mean_would_hide_is_noticed_among_many_tokens() -> None:
    rng = np.random.default_rng(0)
    longest = random_ids(rng, 9), [random_ids(rng, 100), random_ids(rng, 90)]
    weak = with_added(lambda hidden: 0.003 * state_of_the_row(hidden))
    assert probed(SequenceScorer(weak), longest).layout == "rows"


def test_a_model_that_looks_ahead_is_refused_with_the_number() -> None:
    ahead = with_added(lambda hidden: 0.1 * F.pad(hidden, (0, 0, 0, 1))[:, 1:])
    refusal = probed(SequenceScorer(ahead)).refusal
    assert refusal is not None
    assert refusal.startswith("it is not causal: another last token moves log-probs before it by ")
    assert float(refusal.split(" by ")[1].split()[0]) > LOOKS_AHEAD


def test_what_an_encoder_sees_is_not_causal() -> None:
    whole = with_added(lambda hidden: hidden.mean(1, keepdim=True))
    assert "not causal" in (probed(SequenceScorer(whole)).refusal or "")


def test_a_window_that_is_shorter_than_the_longest_sequence_is_noticed() -> None:
    """PhiMoE's is not in its masks by distance; the largest group may have shorter sequences than another."""
    rng = np.random.default_rng(0)
    largest = random_ids(rng, 8), [random_ids(rng, 9) for _ in range(6)]
    longest = random_ids(rng, 20), [random_ids(rng, 20)]

    def beyond(hidden: Tensor) -> Tensor:
        """The mean of the last 17 tokens of the row, which is what packing changes."""
        far = F.pad(hidden, (0, 0, 17, 0))[:, :-17]
        return torch.where(torch.arange(hidden.shape[1])[:, None] >= 17, far, 0.0)

    scorer = SequenceScorer(with_added(beyond))
    trees = trees_of(largest, longest)
    assert max(len(p) + max(map(len, c)) for p, c in trees.long) == 40
    compared = [Comparison(scorer, part, device=CPU) for part in (trees.short, trees.long)]
    assert probe(scorer.layouts, compared).layout == "rows"


def test_a_model_that_pads_wrongly_is_given_one_sequence_at_a_time() -> None:
    def padding(hidden: Tensor) -> Tensor:
        """What a router with a capacity does: what a token gets depends on the length of the rows."""
        return torch.full_like(hidden, 0.01 * hidden.shape[1] * (hidden.shape[0] > 1))

    scorer = SequenceScorer(with_added(padding))
    scorer.layouts = ["rows"]
    found = probed(scorer)
    assert (found.layout, found.one_at_a_time, found.refusal) == ("rows", True, None)
    assert found.notes[0].startswith("layout rows is not used: a token's log-prob differs by ")
    scorer.one_at_a_time = True
    with torch.no_grad():
        logps = scorer(tree_batch([LONGEST], "rows"), per_token=True)
        torch.testing.assert_close(logps, naive_logps(scorer.model, [LONGEST]), rtol=1e-5, atol=5e-5)


def test_what_differs_in_every_layout_is_refused_with_the_numbers() -> None:
    scorer = SequenceScorer(tiny("llama"))

    def wrong(batch: TreeBatch, **options: bool) -> Tensor:
        found: Tensor = scorer(batch, **options)
        return found + 0.5 * (not options.get("as_written"))

    found = probed(scorer, score=wrong)
    assert found.refusal is not None
    assert "differs by 0.5 nats from the model's own" in found.refusal


def test_what_the_model_raises_is_a_refusal_and_no_traceback() -> None:
    scorer = SequenceScorer(tiny("llama"))

    def broken(batch: TreeBatch, **options: bool) -> Tensor:
        raise KeyError("image")

    assert probed(scorer, score=broken).refusal == "the model raised KeyError: 'image'"


def test_memory_that_is_full_is_no_property_of_the_model() -> None:
    scorer = SequenceScorer(tiny("llama"))

    def full(batch: TreeBatch, **options: bool) -> Tensor:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        probed(scorer, score=full)


def test_a_projection_that_ours_does_not_reproduce_is_left_to_the_model() -> None:
    model = tiny("llama")
    model.lm_head = Halved(model.lm_head)  # unknown to us: it halves its logits
    scorer = SequenceScorer(model)
    found = probed(scorer)
    assert (found.layout, found.uses_projection) == ("packed", False)
    assert found.notes[0].startswith("the model's own output projection is used: ours differs by ")
    scorer.uses_projection = False
    with torch.no_grad():
        logps = scorer(tree_batch([LONGEST], "packed"), per_token=True)
        torch.testing.assert_close(logps, naive_logps(model, [LONGEST]), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_the_tolerance_follows_from_measured_rounding_within_bounds(family: str) -> None:
    compared = Comparison(SequenceScorer(tiny(family)), trees_of(LONGEST).long, device=CPU)
    assert compared.refusal() is None
    assert TOLERANCE <= compared.limit <= MOST_TOLERANCE


def test_what_the_compute_type_explains_is_no_reason_against_a_layout() -> None:
    scorer = SequenceScorer(tiny("llama").bfloat16())
    inexact = Comparison(scorer, trees_of(LONGEST).short, device=CPU, exact=False)
    assert probe(scorer.layouts, [inexact]).layout == "packed"

    def wrong(batch: TreeBatch, **options: bool) -> Tensor:
        found: Tensor = scorer(batch, **options)
        return found + 0.5 * (batch.layout != "rows")

    found = probe(scorer.layouts, [Comparison(wrong, trees_of(LONGEST).short, device=CPU, exact=False)])
    assert found.layout == "rows"
    assert "noise is" in found.notes[0]


def test_the_trees_are_those_of_the_longest_sequence_and_the_largest_group() -> None:
    rng = np.random.default_rng(0)
    large = random_ids(rng, 8), [random_ids(rng, n) for n in (4, 9, 5, 7, 6)]
    long = random_ids(rng, 3), [random_ids(rng, 20), random_ids(rng, 2)]
    trees = trees_of(large, long)
    assert [[len(prompt), *map(len, ends)] for prompt, ends in trees.long] == [[3, 20, 2], [8, 9, 7]]
    assert [[len(prompt), *map(len, ends)] for prompt, ends in trees.short] == [[3, 8, 2], [8, 8, 7]]
    alone = trees_of(long, long)
    assert len(alone.long) == 1
    assert len(alone.short) == 2


def test_samples_that_are_longer_than_the_data_are_probed_at_their_length(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    group = TokenizedGroup(
        prompt=random_ids(rng, 4), completions=(random_ids(rng, 6), random_ids(rng, 3)), pairs=()
    )
    write_dataset([group], tmp_path / "data", Counter())
    data = map_dataset(tmp_path / "data", "")
    for at_least, longest in ((0, 10), (10, 10), (25, 25)):
        trees = probe_trees([data], at_least=at_least)
        assert max(len(p) + max(map(len, c)) for p, c in trees.long) == longest
        assert [len(trees.long[0][0]), len(trees.long[0][1][1])] == [4, 3]


class Halved(torch.nn.Module):
    def __init__(self, head: torch.nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = head.weight, head.bias

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight) / 2
