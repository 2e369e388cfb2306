"""The section `loss`: what a pair costs, and how pairs are weighted."""

from dataclasses import dataclass
from typing import Annotated, Literal

from dpo.config.ranges import NotNegative, Positive, Within


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The preference loss."""

    type: list[str] | str = "sigmoid"
    """sigmoid (DPO), ipo, ...: docs/losses.md has all; python:module.function; or a list, which is added."""
    weights: list[Positive] | None = None
    """Weight of each loss of a list. Default: 1 for each."""
    beta: Positive = 0.1
    """How strongly the policy is held to the reference. Some papers call it tau, lambda or 1 / eta."""
    label_smoothing: Annotated[float, Within("[0, 0.5)")] = 0.0
    """Assumed share of flipped labels, for sigmoid (conservative DPO), robust, exo_pair and sigmoid_norm."""
    f_divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"
    """What holds the policy to the reference (f-DPO), for losses of the margin such as sigmoid."""
    f_alpha: Annotated[float, Within("(0, 1)")] = 0.5
    """Of f_divergence alpha, which goes from the reverse KL near 0 to the forward KL near 1."""
    discopop_tau: Annotated[float, Within("(0, 1)")] = 0.05
    """Temperature of discopop's mixing."""
    simpo_gamma: NotNegative = 0.5
    """Target margin of simpo."""
    desirable_weight: Positive = 1.0
    """Weight of desirable completions in kto: raise it where there are fewer of them."""
    undesirable_weight: Positive = 1.0
    """Weight of undesirable completions in kto."""
    sft_weight: NotNegative = 0.0
    """Weight of the chosen completion's negative log-likelihood per token, added to any loss over pairs."""
    ld_alpha: Annotated[float, Within("[0, 1]")] | None = None
    """LD-DPO's weight of tokens beyond the other completion's length; needs reference.store_token_logps."""
    pair_weights: Literal["equal", "score_margin", "wpo"] = "equal"
    """score_margin: each pair counts by how far its scores are apart; wpo: by how likely the policy is to
    write both completions."""
