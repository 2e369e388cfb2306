"""Lion (arXiv 2302.06675), which torch does not have."""

from collections.abc import Callable, Iterable
from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """Moves every number by the learning rate, in the direction of a mix of momentum m and gradient g.

    The paper's algorithm 2: the update is sign(b1 m + (1 - b1) g), and weight decay; then m becomes
    b2 m + (1 - b2) g. One float32 number is kept per parameter.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float = 0.0,
    ) -> None:
        """Keeps no state before the first step.

        Args:
            params: Parameter groups in torch's format.
            lr: Learning rate; a third to a tenth of AdamW's.
            betas: (b1, b2): of the update, and of the momentum.
            weight_decay: Decoupled, as in AdamW.
        """
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient.

        Args:
            closure: Not used; part of torch's interface.
        """
        for group in self.param_groups:
            mixing, decay = group["betas"]
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                momentum = state["exp_avg"]
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(momentum.lerp(gradient, 1 - mixing).sign_(), alpha=-group["lr"])
                momentum.lerp_(gradient, 1 - decay)
