"""Counting of storages: views, known tensors, and the backward pass."""

import torch

from dpo.planning.live_bytes import LiveBytes


def test_a_storage_counts_once_until_it_is_freed() -> None:
    with LiveBytes() as live:
        first = torch.zeros(100)
        assert live.now == 400
        view = first[10:].view(9, 10)
        assert live.now == 400
        second = first + 1
        assert live.now == 800
        del first
        assert live.now == 800, "the view still uses it"
        del view
        assert live.now == 400
        del second
    assert (live.now, live.peak) == (0, 800)


def test_known_and_meta_tensors_do_not_count_and_mapped_ones_do_on_request() -> None:
    known, mapped = torch.zeros(10), torch.zeros(20)
    with LiveBytes([known]) as live:
        _ = known.view(5, 2)
        _ = torch.zeros(1000, device="meta") + 1
        assert live.now == 0
        live.count([mapped, mapped.view(4, 5)])
        assert live.now == 80


def test_operations_are_counted_without_views() -> None:
    with LiveBytes() as live:
        (torch.ones(4).view(2, 2).transpose(0, 1) + 1).mul_(2)
    assert live.operations == 3


def test_allocations_of_a_backward_pass_count() -> None:
    weight = torch.ones(50, 50, requires_grad=True)
    with LiveBytes([weight]) as live:
        (weight @ weight).sum().backward()
        assert live.now == weight.nbytes, "its gradient"
        assert live.peak >= 3 * weight.nbytes
