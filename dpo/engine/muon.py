"""torch's Muon for the matrices of a model's blocks and AdamW for everything else, as one optimizer."""

from collections.abc import Callable
from typing import Any

import torch

MOMENTUM = 0.95
"""That of Muon's author and of arXiv 2502.16982."""


class MuonWithAdamW(torch.optim.Optimizer):
    """Both optimizers share this one's groups and state, so that it is saved and loaded like any other.

    Muon's updates are scaled to the size of AdamW's (arXiv 2502.16982), so that one learning rate suits both.
    """

    def __init__(
        self,
        matrices: list[dict[str, Any]],
        others: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        """Keeps no state before the first step.

        Args:
            matrices: Parameter groups of Muon, which takes two dimensions only.
            others: Those of AdamW.
            lr: Learning rate of both.
            betas: AdamW's decay rates.
            eps: AdamW's epsilon.
        """
        self._parts: list[torch.optim.Optimizer] = []
        if matrices:
            scaled = "match_rms_adamw"
            self._parts.append(torch.optim.Muon(matrices, lr=lr, momentum=MOMENTUM, adjust_lr_fn=scaled))
        if others:
            self._parts.append(torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps, fused=True))
        super().__init__([group for part in self._parts for group in part.param_groups], {"lr": lr})
        self._share()

    def _share(self) -> None:
        """Gives both optimizers this one's groups and state."""
        first = 0
        for part in self._parts:
            part.state = self.state
            part.param_groups = self.param_groups[first : first + len(part.param_groups)]
            first += len(part.param_groups)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As torch, which replaces groups and state when it loads them."""
        super().__setstate__(state)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient.

        Args:
            closure: Not used; part of torch's interface.
        """
        for part in self._parts:
            part.step()
