"""The layout `varlen` without a GPU: its index tensors, what its kernel is asked for, and when it is taken.

tests/unit/model/test_attention.py compares it with rows in every family, its pieces computed one by one.
"""

import numpy as np
import pytest
import torch
from families import random_tree, tiny
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import varlen as torchs

from dpo.data.pieces import pieces_of
from dpo.data.trees import tree_batch
from dpo.model import attention, varlen
from dpo.model.attention import TreeAttention
from dpo.model.first_blocks import in_float32
from dpo.model.probe import Comparison, probe
from dpo.model.probe_trees import trees_of
from dpo.model.scorer import SequenceScorer

LENGTHS = st.lists(st.lists(st.integers(1, 9), min_size=2, max_size=5).map(tuple), min_size=1, max_size=4)
CPU = torch.device("cpu")


def test_pieces_by_hand() -> None:
    found = pieces_of([(2, 1, 2), (1, 3)])
    assert found.keys.tolist() == [0, 1, 0, 1, 2, 0, 1, 3, 4, 5, 6, 7, 8]
    assert found.query_starts.tolist() == [0, 2, 3, 5, 9]
    assert found.key_starts.tolist() == [0, 2, 5, 9, 13]
    assert (found.most_queries, found.most_keys) == (4, 4)
    assert found.query_starts.dtype == found.key_starts.dtype == torch.int32


@given(lengths=LENGTHS)
def test_a_query_sees_the_keys_that_its_batch_says(lengths: list[tuple[int, ...]]) -> None:
    """Bottom-right causal over the gathered keys is the mask of segments, prefixes and positions."""
    trees = [(np.ones(p, dtype=np.int32), [np.ones(n, dtype=np.int32) for n in rest]) for p, *rest in lengths]
    batch = tree_batch(trees, "varlen")
    segments, prefixes, positions = batch.segments[0], batch.prefixes[0], batch.positions[0]
    wanted = (segments[None] == segments[:, None]) | (segments[None] == prefixes[:, None])
    wanted &= positions[None] <= positions[:, None]
    assert torch.equal(seen(batch.pieces, None), wanted)
    for window in (1, 3):
        near = positions[:, None] - positions[None] < window
        assert torch.equal(seen(batch.pieces, window), wanted & near)


def seen(pieces: varlen.Pieces, window: int | None) -> Tensor:
    """(T, T) whether a query attends to a token: as FlashAttention defines it, piece by piece."""
    found = torch.zeros(int(pieces.query_starts[-1]), int(pieces.query_starts[-1]), dtype=torch.bool)
    for piece in range(len(pieces.query_starts) - 1):
        first, end = pieces.query_starts[piece : piece + 2].tolist()
        keys = pieces.keys[pieces.key_starts[piece] : pieces.key_starts[piece + 1]].tolist()
        for query in range(first, end):
            last = len(keys) - (end - first) + (query - first)
            least = 0 if window is None else max(0, last - window + 1)
            found[query, keys[least : last + 1]] = True
    return found


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """torch's function as it is documented, written once more."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert int(cu_seq_q.diff().max()) == max_q
    assert int(cu_seq_k.diff().max()) == max_k
    assert query.is_contiguous()
    assert key.is_contiguous()
    groups = query.shape[1] // key.shape[1]
    assert enable_gqa == (groups > 1)
    left, right = window_size
    assert right == 0
    outputs = []
    for piece in range(len(cu_seq_q) - 1):
        own = query[cu_seq_q[piece] : cu_seq_q[piece + 1]].float()
        at = slice(int(cu_seq_k[piece]), int(cu_seq_k[piece + 1]))
        keys, values = (part[at].float().repeat_interleave(groups, 1) for part in (key, value))
        scores = torch.einsum("qhd,khd->hqk", own, keys) * (scale or query.shape[-1] ** -0.5)
        places = torch.arange(len(own))[:, None] + len(keys) - len(own)
        back = places - torch.arange(len(keys))[None]
        hidden = (back < 0) | ((back > left) if left >= 0 else torch.zeros_like(back, dtype=torch.bool))
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(outputs).to(query.dtype)


@pytest.mark.parametrize("window", [None, 7])
def test_the_kernel_is_asked_for_what_packed_computes(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "_kernel_takes", lambda query: True)
    monkeypatch.setattr(torchs, "varlen_attn", flash_attention)
    trees = [random_tree(np.random.default_rng(seed), 1 + seed, longest=20) for seed in range(3)]
    found = []
    for layout in ("varlen", "packed"):
        batch = tree_batch(trees, layout).to(CPU)  # type: ignore[arg-type]
        torch.manual_seed(0)
        width = batch.input_ids.shape[1]
        query, key, value = (torch.randn(1, heads, width, 8, requires_grad=True) for heads in (4, 2, 2))
        layer = torch.nn.Module()
        layer.num_key_value_groups = 2  # type: ignore[assignment]
        outputs, _ = attention.tree_attention(
            layer, query, key, value, None, 0.3, tree=TreeAttention(batch=batch), sliding_window=window
        )
        gradients = torch.autograd.grad((outputs * torch.arange(8.0)).sum(), [query, key, value])
        found.append([outputs, *gradients])
    for ours, packed in zip(*found, strict=True):
        torch.testing.assert_close(ours, packed, rtol=1e-5, atol=1e-5)


def test_on_a_gpu_the_kernels_sizes_are_known_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its shapes alone, on the meta device, where every wait raises."""
    monkeypatch.setattr(varlen, "_kernel_takes", lambda query: True)
    batch = tree_batch([random_tree(np.random.default_rng(0), 3)], "varlen").to(torch.device("meta"))
    states = torch.zeros(3, 1, 2, batch.input_ids.shape[1], 8, dtype=torch.bfloat16, device="meta").unbind()
    found, _ = attention.tree_attention(torch.nn.Module(), *states, None, tree=TreeAttention(batch=batch))
    assert found.shape == (1, batch.input_ids.shape[1], 2, 8)


def test_what_the_kernel_cannot_is_left_to_other_layouts() -> None:
    batch = tree_batch([random_tree(np.random.default_rng(0), 2)], "varlen")
    states = torch.zeros(3, 1, 2, batch.input_ids.shape[1], 8).unbind()
    with pytest.raises(NotImplementedError, match="soft cap"):
        attention.tree_attention(
            torch.nn.Module(), *states, None, tree=TreeAttention(batch=batch), softcap=30.0
        )


def test_it_is_taken_where_flex_attention_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object, **options: object) -> None:
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(attention, "compiled_flex", refused)
    assert SequenceScorer(tiny("llama"), flex=True).layouts == ["flex", "packed", "trees", "rows"]
    scorer = SequenceScorer(tiny("llama").bfloat16(), flex=True)
    trees = trees_of(random_tree(np.random.default_rng(0), 3))
    compared = [
        Comparison(in_float32(scorer), trees.long, device=CPU, windows=scorer.windows),
        Comparison(scorer, trees.short, device=CPU, windows=scorer.windows, exact=False),
    ]
    with torch.no_grad():
        probed = probe(scorer.layouts, compared)
    assert probed.layout == "varlen"
    assert "layout flex is not used" in " ".join(probed.notes)
