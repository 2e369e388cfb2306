"""What a loss is given: the same pairs under the policy and, where it needs one, under the reference."""

from dataclasses import dataclass

from torch import Tensor

from dpo.records import PairLogProbs


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """B pairs; the pairs of a group stand together, and every group is whole."""

    policy: PairLogProbs
    """With gradient."""
    reference: PairLogProbs | None
    """Without; None for losses that need none."""

    @property
    def chosen_logratios(self) -> Tensor:
        """(B,) log(policy / reference) of the chosen completion, in nats."""
        assert self.reference is not None
        return self.policy.chosen - self.reference.chosen

    @property
    def rejected_logratios(self) -> Tensor:
        """(B,) the same of the rejected completion."""
        assert self.reference is not None
        return self.policy.rejected - self.reference.rejected

    @property
    def margins(self) -> Tensor:
        """(B,) chosen less rejected log-ratio."""
        return self.chosen_logratios - self.rejected_logratios

    @property
    def chosen_means(self) -> Tensor:
        """(B,) log-prob of the chosen completion a token, under the policy."""
        return self.policy.chosen / self.policy.chosen_tokens

    @property
    def rejected_means(self) -> Tensor:
        """(B,) the same of the rejected completion."""
        return self.policy.rejected / self.policy.rejected_tokens
