"""Which experts the tokens of a batch chose, and the family's own load-balancing loss.

The loss (arXiv 2101.03961, equations 4 to 6, as in transformers) is a product of two means over all tokens:
of the picks of each expert, which have no gradient, and of its probability. Here both are sums over one
batch, so that a caller can add them over batches and ranks first. A token counts once for each sequence that
it is in: the sums are those of separate rows without padding, whatever the layout.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from dpo.data.trees import TreeBatch
from dpo.errors import UserError

OWN_LOSS = "load_balancing_loss_func"
"""Its name in the modules of all families that have one."""
CHOICE = ("top_k_index", "router_indices")
"""Names, in the forward passes of families' experts, of the experts that tokens chose."""


@dataclass(slots=True, kw_only=True)
class Routed:
    """What the routers said in one forward pass; complete when the block of `watching` has ended."""

    load: Tensor
    """(sum of E over layers,) float64 picks of each expert of each layer, without gradient."""
    balance: "Balance | None" = None
    """Of the balancing loss, where it is wanted."""

    def detached(self) -> "Routed":
        """The same without gradient, so that it does not keep the forward pass alive."""
        balance = self.balance
        if balance is not None:
            balance = replace(balance, probabilities=balance.probabilities.detach())
        return Routed(load=self.load, balance=balance)


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """Sums over layers and tokens; those of several batches add up."""

    picks: Tensor
    """(E,) float64: how many of the tokens' k most probable experts each is; without gradient."""
    probabilities: Tensor
    """(E,) float64 of each expert's probability, with gradient where gradients are enabled."""
    num_tokens: Tensor
    """Scalar float64: tokens times layers."""


def balancing_loss(picks: Tensor, probabilities: Tensor, num_tokens: Tensor) -> Tensor:
    """Number of experts x sum over experts of share of picks x mean probability; top-k if balanced.

    Args:
        picks: As in `Balance`, of all tokens that are balanced together.
        probabilities: Of the same tokens, or of some of them: the parts then add up to the whole.
        num_tokens: Of all tokens.
    """
    return len(picks) * (picks * probabilities).sum() / num_tokens**2


class Routers:
    """The routers and experts of a model."""

    def __init__(self, model: PreTrainedModel, *, balanced: bool = False) -> None:
        """Finds them by how transformers calls and records them.

        Args:
            model: The bare model; adapters may be in it.
            balanced: Whether the balancing loss is wanted.

        Raises:
            UserError: It is, and the family has none.
        """
        self._experts = [module for module in model.modules() if _choice_of(module)[1]]
        self.num_experts = [int(module.num_experts) for module in self._experts]  # type: ignore[arg-type]
        """E of each layer that has experts; of families whose experts are not given the choice, none."""
        self._gates: list[nn.Module] = []
        self._index, self._top_k = 0, 0
        if balanced:
            self._find_gates(model)

    @contextmanager
    def watching(self, batch: TreeBatch) -> Iterator[Routed]:
        """Fills what it gives when the block, in which the model computes `batch` once, has ended."""
        routed = Routed(load=torch.zeros(0, dtype=torch.float64))
        if not self._experts and not self._gates:
            yield routed
            return
        chosen: dict[nn.Module, list[Tensor]] = {module: [] for module in self._experts}
        logits: dict[nn.Module, list[Tensor]] = {module: [] for module in self._gates}

        def choose(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            place, name = _choice_of(module)
            index = options[name] if name in options else args[place]
            chosen[module].append(index.detach().flatten(0, -2))

        def score(module: nn.Module, args: Any, output: Any) -> None:
            found = output[self._index] if isinstance(output, tuple) else output
            logits[module].append(found.flatten(0, -2))

        hooks = [module.register_forward_pre_hook(choose, with_kwargs=True) for module in self._experts]
        hooks += [module.register_forward_hook(score) for module in self._gates]
        try:
            yield routed
        finally:  # recomputed activations are not looked at again
            for hook in hooks:
                hook.remove()
        weights = batch.num_readers.double().flatten()
        alone = torch.cat(
            [row[: sum(tree)] for row, tree in zip(batch.num_readers, batch.trees, strict=False)]
        )

        def of(values: Tensor) -> Tensor:  # padding, if the model was given any
            return weights if len(values) == len(weights) else alone.double()

        counts = [
            _picks(index, of(index), experts)
            for index, experts in zip(map(torch.cat, chosen.values()), self.num_experts, strict=True)
        ]
        routed.load = torch.cat([weights[:0], *counts])
        if logits:
            routed.balance = _balance([torch.cat(parts) for parts in logits.values()], of, self._top_k)

    def _find_gates(self, model: PreTrainedModel) -> None:
        """Raises UserError where the family has no loss, or another than ours."""
        recorder = _recorder(model)
        own = _own_loss(type(model))
        if recorder is None or own is None:
            raise UserError(_NO_LOSS.format(name=type(model).__name__))
        self._gates = [
            module
            for name, module in model.named_modules()
            if isinstance(module, recorder.target_class) and (recorder.layer_name or "") in name
        ]
        self._index = recorder.index
        config = model.config.get_text_config()
        top_k = getattr(model, "num_experts_per_tok", None) or getattr(config, "num_experts_per_tok", None)
        if not self._gates or top_k is None:
            raise UserError(_NO_LOSS.format(name=type(model).__name__))
        self._top_k = int(top_k)
        logits = torch.arange(2 * 7.0 * (self._top_k + 3)).sin()  # any, without a draw
        layers = logits.reshape(2, 7, -1).unbind()
        found = _balance(list(layers), lambda values: torch.ones(len(values)), self._top_k)
        ours = balancing_loss(found.picks, found.probabilities, found.num_tokens)
        if not torch.allclose(ours.float(), own(layers, self._top_k + 3, self._top_k)):
            raise UserError(
                f"model.router_aux_loss_weight: {type(model).__name__} has a balancing loss that is not a "
                "product of two means, and cannot be computed in pieces; set 0"
            )


_NO_LOSS = (
    "model.router_aux_loss_weight: {name} has no load-balancing loss in transformers over one kind of router "
    "(no router, or it is balanced otherwise); set 0"
)


def check_balancing(config: PreTrainedConfig) -> None:
    """Raises UserError if transformers' class for a config has no balancing loss; `Routers` knows more."""
    family = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if isinstance(family, type) and _own_loss(family) is None:
        raise UserError(_NO_LOSS.format(name=family.__name__))


def _own_loss(family: type) -> Callable[..., Any] | None:
    found: Callable[..., Any] | None = getattr(sys.modules[family.__module__], OWN_LOSS, None)
    return found


def _recorder(model: PreTrainedModel) -> OutputRecorder | None:
    """Where the family's own code finds its router logits; None if that is nowhere or in several places."""
    for module in model.modules():
        recorded = getattr(module, "_can_record_outputs", None) or {}
        if isinstance(recorder := recorded.get("router_logits"), OutputRecorder):
            return recorder
    return None


def _choice_of(module: nn.Module) -> tuple[int, str]:
    """Position and name of the argument with the experts that tokens chose; an empty name without one."""
    if not isinstance(getattr(module, "num_experts", None), int):
        return 0, ""
    given = enumerate(inspect.signature(module.forward).parameters)
    return next(((place, name) for place, name in given if name in CHOICE), (0, ""))


def _picks(index: Tensor, weights: Tensor, num_experts: int) -> Tensor:
    """(E,) float64 sums of tokens' weights by expert.

    Args:
        index: (T, k) experts; `num_experts` for none.
        weights: (T,) of tokens.
        num_experts: E.
    """
    sums = torch.zeros(num_experts + 1, dtype=torch.float64, device=index.device)
    spread = weights.double()[:, None].expand(index.shape)
    return sums.scatter_add(0, index.flatten().long(), spread.flatten())[:num_experts]


def _balance(logits: list[Tensor], weights_of: Callable[[Tensor], Tensor], top_k: int) -> Balance:
    """Sums over layers of (T, E) logits, in the order of the family's own function."""
    picks, sums, num_tokens = [], [], []
    for layer in logits:
        weights = weights_of(layer).to(layer.device, torch.float64)
        probabilities = layer.softmax(-1)
        picks.append(_picks(probabilities.detach().topk(top_k, -1).indices, weights, layer.shape[-1]))
        sums.append(weights @ probabilities.double())
        num_tokens.append(weights.sum())
    return Balance(
        picks=torch.stack(picks).sum(0),
        probabilities=torch.stack(sums).sum(0),
        num_tokens=torch.stack(num_tokens).sum(),
    )
