"""From hidden states to log-probs of given tokens, without a (tokens x vocabulary) tensor.

The vocabulary is processed in slices: a product with a slice of the output matrix stays in the cache and is
faster than one with the whole matrix. For the backward pass, hidden states and one log-sum-exp per token are
saved; slices of logits are kept within a fixed memory budget and recomputed beyond it. On a GPU the Triton
kernels of `dpo.model.projection_kernels` do what is between the products.
"""

from importlib.util import find_spec
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

SLICE_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}
"""Number of logits in one slice (all tokens x a part of the vocabulary): fits a CPU's cache, fills a GPU."""
MIN_SLICE = 1024
"""Vocabulary entries; the size of a slice is a multiple of this."""
KEPT_BYTES = 2**28
"""Bytes of logits that are kept for the backward pass instead of being recomputed."""


class Kernels(Protocol):
    """What is done between the products, as in `dpo.model.projection_kernels`, which says what is what."""

    def reduced(
        self, logits: Tensor, targets: Tensor, start: int, scale: float, cap: float | None
    ) -> tuple[Tensor, Tensor]:
        """Log-sum-exp and target's logit of each row of a slice."""

    def slopes_(
        self,
        logits: Tensor,
        targets: Tensor,
        start: int,
        scale: float,
        cap: float | None,
        totals: Tensor,
        outer: Tensor,
    ) -> Tensor:
        """The slice, overwritten with the gradient of the product."""


class TokenLogProbs(nn.Module):
    """The output projection of a causal language model, for the log-probs of given tokens only.

    It refers to the model's output layer without registering it, so that the state dict does not change.
    """

    def __init__(self, head: nn.Linear, config: PreTrainedConfig) -> None:
        """Reads scaling and soft-capping from the config.

        Args:
            head: The model's output layer, with or without bias, tied or not.
            config: Of the model.
        """
        super().__init__()
        self._head = (head,)
        config = config.get_text_config()
        self._scale = float(getattr(config, "logit_scale", None) or 1.0)
        self._scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        cap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
        self._cap: float | None = cap
        self.device_type: str | None = None
        """Whose slices and products are used, such as "cuda"; None: those of the hidden states' device."""
        self.slice_elements: int | None = None
        """Number of logits in one slice; None: as in `SLICE_ELEMENTS`."""
        self.kernels: Kernels | Literal[False] | None = None
        """The Triton kernels; False: without them; None: where they run."""

    def forward(self, hidden: Tensor, targets: Tensor, *, squares: bool = False) -> Tensor:
        """Log softmax(y)[target] with y = cap * tanh(scale * (W h + b) / cap), or without the cap.

        Args:
            hidden: (N, D) hidden states.
            targets: (N,) int64 token ids.
            squares: Also give the logarithm of the sum of all tokens' squared probabilities.

        Returns:
            (N,) float32 log-probs in nats, with gradients for hidden states, W and b; or with `squares`
            (N, 2), the second column without gradient.
        """
        head = self._head[0]
        device = self.device_type or hidden.device.type
        elements = self.slice_elements or SLICE_ELEMENTS.get(device, SLICE_ELEMENTS["cuda"])
        size = _slice_size(len(hidden), elements)
        kernels = kernels_on(hidden.device) if self.kernels is None else self.kernels
        logps: Tensor = _TokenLogProbs.apply(  # type: ignore[no-untyped-call]  # torch has no types for it
            hidden, head.weight, head.bias, targets, self._scale, self._cap, size, kernels or None, device
        )
        if not squares:
            return logps
        with torch.no_grad():
            of_squares = _log_sum_squares(hidden, head.weight, head.bias, size, self._scale, self._cap)
        return torch.stack([logps, of_squares], dim=1)

    @property
    def head(self) -> nn.Linear:
        """The model's output layer."""
        return self._head[0]


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        cap: float | None,
        size: int,
        kernels: Kernels | None,
        device: str,
    ) -> Tensor:
        shape = (scale, cap) if kernels is None else (1.0, None)  # the kernels scale and cap
        total: Tensor | None = None
        picked = torch.zeros(len(hidden), dtype=torch.float32, device=hidden.device)
        kept: list[Tensor] = []
        may_keep = KEPT_BYTES if any(ctx.needs_input_grad) else 0
        for start in range(0, len(weight), size):
            logits = _logits(hidden, weight, bias, start, size, *shape)
            if kernels is None:
                ours, place = _in_slice(targets, start, logits.shape[1])
                picked += torch.where(ours, logits.gather(1, place)[:, 0].float(), 0.0)
                slice_total = logits.float().logsumexp(1)
            else:
                slice_total, found = kernels.reduced(logits, targets, start, scale, cap)
                picked += found
            total = slice_total if total is None else torch.logaddexp(total, slice_total)
            may_keep -= logits.nbytes
            if may_keep >= 0:
                kept.append(logits)
        assert total is not None
        ctx.save_for_backward(hidden, weight, bias, targets, total)
        ctx.options, ctx.kept = (size, scale, cap, shape, kernels, device), kept
        return picked - total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, total = ctx.saved_tensors
        (size, scale, cap, shape, kernels, device), kept = ctx.options, ctx.kept
        ctx.kept = []  # they are overwritten below; a second backward pass recomputes them
        outer, dtype = gradients[0].float(), hidden.dtype
        to_hidden, to_weight, to_bias = ctx.needs_input_grad[:3]
        for_hidden = torch.zeros_like(hidden, dtype=torch.float32) if to_hidden else None
        for_weight = torch.empty_like(weight) if to_weight else None
        for_bias = torch.empty_like(bias) if bias is not None and to_bias else None
        for number, start in enumerate(range(0, len(weight), size)):
            if number < len(kept):
                logits = kept[number]
            else:
                logits = _logits(hidden, weight, bias, start, size, *shape)
            end = start + logits.shape[1]
            if kernels is None:
                slopes = _slopes(logits, targets, start, scale, cap, total, outer)
            else:
                slopes = kernels.slopes_(logits, targets, start, scale, cap, total, outer)
            if for_bias is not None:
                for_bias[start:end] = slopes.sum(0, dtype=torch.float32)
            narrow = slopes.to(dtype)
            if for_hidden is not None:
                _add_product(for_hidden, slopes, narrow, weight[start:end].to(dtype), device)
            if for_weight is not None and weight.dtype == dtype:
                torch.mm(narrow.T, hidden, out=for_weight[start:end])
            elif for_weight is not None:
                for_weight[start:end] = narrow.T @ hidden
        wanted = None if for_hidden is None else for_hidden.to(hidden.dtype)
        return wanted, for_weight, for_bias, None, None, None, None, None, None


def _slopes(
    logits: Tensor,
    targets: Tensor,
    start: int,
    scale: float,
    cap: float | None,
    total: Tensor,
    outer: Tensor,
) -> Tensor:
    """(N, M) float32 gradient of the product over a slice of scaled and capped logits."""
    ours, place = _in_slice(targets, start, logits.shape[1])
    flat = 1 - (logits.float() / cap) ** 2 if cap is not None else None
    # d logp / d y = [target] - softmax(y)
    slopes = logits.float().sub_(total[:, None]).exp_().mul_(-outer[:, None])
    slopes.scatter_add_(1, place, torch.where(ours, outer, 0.0)[:, None])
    if flat is not None:
        slopes.mul_(flat)
    return slopes.mul_(scale) if scale != 1 else slopes


def kernels_on(device: torch.device) -> Kernels | None:
    """The Triton kernels where they run: on a GPU, with Triton and what it needs."""
    if device.type != "cuda" or find_spec("triton") is None:
        return None
    from dpo.model import projection_kernels  # here: it imports triton

    return projection_kernels if projection_kernels.run_here() else None


def _log_sum_squares(
    states: Tensor, weight: Tensor, bias: Tensor | None, size: int, scale: float, cap: float | None
) -> Tensor:
    """(N,) log of the sum over the vocabulary of softmax(y)^2."""
    parts = []
    for start in range(0, len(weight), size):
        logits = _logits(states, weight, bias, start, size, scale, cap).float()
        parts.append(torch.stack([(2 * logits).logsumexp(1), logits.logsumexp(1)]))
    doubled, total = torch.stack(parts).logsumexp(0).unbind()
    return doubled - 2 * total


def _add_product(total: Tensor, wide: Tensor, narrow: Tensor, right: Tensor, device: str) -> None:
    """Adds the float32 product of `narrow` (`wide`, rounded) and `right`: no sum is rounded."""
    if narrow.dtype == torch.float32:
        total += narrow @ right
    elif device == "cpu":  # CPUs have no such kernel: few rows at a time are widened
        for start in range(0, len(right), MIN_SLICE):
            rows = slice(start, start + MIN_SLICE)
            total.addmm_(wide[:, rows].float(), right[rows].float())
    else:
        total += torch.mm(narrow, right, out_dtype=torch.float32)


def _slice_size(num_tokens: int, elements: int) -> int:
    """Vocabulary entries of a slice, in whole multiples of `MIN_SLICE`."""
    return max(1, elements // max(1, num_tokens) // MIN_SLICE) * MIN_SLICE


def _logits(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    start: int,
    size: int,
    scale: float,
    cap: float | None,
) -> Tensor:
    part = None if bias is None else bias[start : start + size].to(states.dtype)
    logits = nn.functional.linear(states, weight[start : start + size].to(states.dtype), part)
    if scale != 1:
        logits *= scale
    if cap is not None:
        logits = torch.tanh_(logits.div_(cap)).mul_(cap)
    return logits


def _in_slice(targets: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
    """(N,) bool whether each target is in the slice, and (N, 1) its column there; without synchronization."""
    local = targets - start
    return (local >= 0) & (local < size), local.clamp(0, size - 1)[:, None]
