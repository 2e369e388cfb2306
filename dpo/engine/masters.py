"""What DeepSpeed's ZeRO does for a policy, without DeepSpeed: one device, or a whole replica per rank.

The model computes with its weights in the compute type, the function that a reference in that type is. The
optimizer updates float32 masters, which are then rounded to the weights; weights as wide as that are their
own masters. Gradients are summed in float32 over micro-batches and ranks, and sent once per step.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dpo import distributed
from dpo.errors import RunFailed

FLOAT32 = 4
BUCKET_ELEMENTS = 2**23
"""Gradients that are sent in one message, while the backward pass computes the next ones."""


class Masters:
    """Float32 masters and gradients of what is trained, the same on every rank."""

    def __init__(self, trained: Sequence[nn.Parameter]) -> None:
        """Copies rank 0's weights to all ranks; from here on backward passes add to the masters' gradients.

        Args:
            trained: Weights that need a gradient, on their device, in the same order on all ranks.
        """
        if distributed.is_distributed():
            for weight in trained:
                dist.broadcast(weight.data, src=0)
        self.of: Mapping[nn.Parameter, nn.Parameter] = {
            weight: nn.Parameter(weight.detach().float().contiguous())
            if weight.itemsize < FLOAT32
            else weight
            for weight in trained
        }
        """Weight -> its master, which the optimizer updates."""
        backwards = [*self.of.items()][::-1]  # about the order in which gradients are ready
        self._buckets = [_Bucket(part) for part in _cut(backwards)]
        self._bucket_of = {weight: bucket for bucket in self._buckets for weight in bucket.weights}
        self._next: int | None = None  # index of the bucket to send next; None: none in this backward pass
        for weight in trained:
            weight.register_post_accumulate_grad_hook(self._add)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the gradient of a loss; after the last one of a step, gradients are summed over ranks.

        Args:
            loss: Scalar.
            last: Whether it is the step's last. Every rank must make the same number of calls.
        """
        self._next = 0 if last and distributed.is_distributed() else None
        for bucket in self._buckets:
            bucket.waiting = set(bucket.weights)
        loss.backward()
        if self._next is not None:
            self._send(len(self._buckets))  # no token has reached the weights that are still waited for
            for bucket in self._buckets:
                bucket.receive()

    def _add(self, weight: nn.Parameter) -> None:
        master, bucket = self.of[weight], self._bucket_of[weight]
        if bucket.work is not None:
            raise RunFailed("a weight got a second gradient in a backward pass, after the first was sent")
        if master is not weight:
            assert weight.grad is not None
            assert master.grad is not None
            master.grad.add_(weight.grad)
            weight.grad = None
        bucket.waiting.discard(weight)
        if self._next is not None:
            self._send(next((i for i, b in enumerate(self._buckets) if b.waiting), len(self._buckets)))

    def _send(self, end: int) -> None:
        """Starts the sums of the buckets before `end`, in the same order on all ranks."""
        assert self._next is not None
        for bucket in self._buckets[self._next : end]:
            bucket.work = dist.all_reduce(bucket.gradients, async_op=True)
        self._next = max(self._next, end)

    @torch.no_grad()
    def round(self) -> None:
        """Rounds the masters to the weights, after an update."""
        pairs = [pair for pair in self.of.items() if pair[0] is not pair[1]]
        if pairs:
            torch._foreach_copy_([weight for weight, _ in pairs], [master for _, master in pairs])

    def zero_gradients(self) -> None:
        """Starts the next step."""
        for bucket in self._buckets:
            bucket.gradients.zero_()

    def named(self, module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """The masters by the names that a module has for their weights; tied weights have two.

        Args:
            module: Holds the weights.
        """
        for name, weight in module.named_parameters(remove_duplicate=False):
            if weight in self.of:
                yield name, self.of[weight]


class _Bucket:
    """Gradients of some weights, one after the other in one tensor."""

    def __init__(self, pairs: Sequence[tuple[nn.Parameter, nn.Parameter]]) -> None:
        self.weights = [weight for weight, _ in pairs]
        sizes = [weight.numel() for weight in self.weights]
        first = pairs[0][1]
        self.gradients = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
        for (_, master), part in zip(pairs, self.gradients.split(sizes), strict=True):
            master.grad = part.view(master.shape)
        self.waiting: set[nn.Parameter] = set()
        self.work: dist.Work | None = None

    def receive(self) -> None:
        """Waits for the sum over ranks."""
        assert self.work is not None
        self.work.wait()
        self.work = None


def _cut(
    pairs: Sequence[tuple[nn.Parameter, nn.Parameter]],
) -> Iterator[list[tuple[nn.Parameter, nn.Parameter]]]:
    """Runs of pairs of one type with at most `BUCKET_ELEMENTS` elements, or one pair that has more."""
    run, size = list[tuple[nn.Parameter, nn.Parameter]](), 0
    for pair in pairs:
        if run and (size + pair[0].numel() > BUCKET_ELEMENTS or pair[1].dtype != run[0][1].dtype):
            yield run
            run, size = [], 0
        run.append(pair)
        size += pair[0].numel()
    if run:
        yield run
