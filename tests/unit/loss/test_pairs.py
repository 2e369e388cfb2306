"""Values of pairs out of values per sequence or per token, and what a loss derives from them."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dpo.loss.pairs import PairLogProbs, Pairs, aligned_pair_logps, pair_logps

# two groups: completions of 1 and 2 tokens, and of 1, 2 and 3 tokens
NUM_TOKENS = torch.tensor([1, 2, 1, 2, 3])
PAIRS = torch.tensor([[0, 1], [4, 2], [4, 3]])
NO_PAIRS = torch.zeros((0, 2), dtype=torch.int64)


def test_values_of_pairs_are_picked_by_sequence() -> None:
    found = pair_logps(torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0]), PAIRS, NUM_TOKENS)
    assert found.chosen.tolist() == [-1.0, -5.0, -5.0]
    assert found.rejected.tolist() == [-2.0, -3.0, -4.0]
    assert found.chosen_tokens.tolist() == [1, 3, 3]
    assert found.rejected_tokens.tolist() == [2, 1, 2]
    assert found.chosen_sequences is not None
    assert found.chosen_sequences.tolist() == [0, 4, 4]


def test_a_completion_with_a_label_has_no_rival() -> None:
    logps = torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0], requires_grad=True)
    found = pair_logps(logps, torch.tensor([[3, -1], [-1, 0]]), NUM_TOKENS, mismatched=torch.tensor([4]))
    assert (found.chosen.tolist(), found.rejected.tolist()) == ([-4.0, 0.0], [0.0, -1.0])
    assert (found.chosen_tokens.tolist(), found.rejected_tokens.tolist()) == ([2, 0], [0, 1])
    assert found.mismatched is not None
    assert found.mismatched.tolist() == [-5.0]
    (slopes,) = torch.autograd.grad((found.chosen + 2 * found.rejected).sum(), logps)
    assert slopes.tolist() == [2.0, 0.0, 0.0, 1.0, 0.0]
    pairs = Pairs(policy=found, reference=None)
    assert pairs.has_chosen.tolist() == [True, False]
    assert pairs.by_side(found.chosen, found.rejected).tolist() == [-4.0, -1.0]
    assert pairs.chosen_means.tolist() == [-2.0, 0.0]


def test_a_second_column_gives_weights_by_mean_over_tokens() -> None:
    values = torch.tensor(
        [[-1.0, 1.0], [-2.0, -2.0], [-3.0, 3.0], [-4.0, 1.0], [-5.0, 6.0]], requires_grad=True
    )
    found = aligned_pair_logps(values, PAIRS, NUM_TOKENS)
    assert found.chosen.tolist() == [-1.0, -5.0, -5.0]
    assert found.aligned is not None
    assert found.aligned.tolist() == [1 - 2 / 2, 6 / 3 + 3, 6 / 3 + 1 / 2]
    assert not found.aligned.requires_grad
    assert aligned_pair_logps(torch.zeros(1, 2), NO_PAIRS, torch.tensor([0])).chosen.shape == (0,)


def test_tokens_beyond_the_shorter_completion_count_by_alpha() -> None:
    num_tokens, pairs = torch.tensor([1, 3, 2]), torch.tensor([[1, 0], [0, 2], [1, 2]])
    logps = torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0, -6.0], requires_grad=True)  # of the six tokens
    found = pair_logps(logps, pairs, num_tokens, 0.25)
    assert found.chosen.tolist() == [-2 + 0.25 * (-3 - 4), -1, -2 - 3 + 0.25 * -4]
    assert found.rejected.tolist() == [-1, -5 + 0.25 * -6, -5 - 6]
    found.chosen.sum().backward()
    assert logps.grad is not None
    assert logps.grad.tolist() == [1, 2, 1.25, 0.5, 0, 0]
    assert pair_logps(logps.detach(), pairs, num_tokens, 0.0).chosen.tolist() == [-2, -1, -5]
    sums = pair_logps(torch.tensor([-1.0, -9.0, -11.0]), pairs, num_tokens)
    every_token = pair_logps(logps.detach(), pairs, num_tokens, 1.0)
    assert torch.equal(every_token.chosen, sums.chosen.double())


class Recorded(TorchDispatchMode):
    """Names of the operations on floating-point numbers, in the forward and the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            self.names.add(func.overloadpacket.__name__)
        return result


def test_no_operation_lacks_a_deterministic_kernel_on_gpus() -> None:
    # torch.use_deterministic_algorithms lists them; a cumulative sum of floats is one, on CUDA only.
    logps = torch.randn(9, requires_grad=True)
    with Recorded() as recorded:
        found = pair_logps(logps, PAIRS, NUM_TOKENS, 0.5)
        (found.chosen.sum() - found.rejected.sum()).backward()
    assert "sum" in recorded.names
    assert not recorded.names & {"cumsum", "put_", "median", "histc", "bincount"}


def test_a_token_without_a_finite_log_prob_spoils_its_own_pairs_only() -> None:
    logps = torch.zeros(9)
    logps[2] = -torch.inf  # of sequence 1
    found = pair_logps(logps, PAIRS, NUM_TOKENS, 0.5)
    assert found.rejected.tolist() == [-torch.inf, 0, 0]
    assert found.chosen.tolist() == [0, 0, 0]


@pytest.mark.parametrize("ld_alpha", [None, 0.5])
def test_a_batch_without_pairs_gives_no_values(ld_alpha: float | None) -> None:
    logps = torch.zeros(1 if ld_alpha is None else 0)
    assert pair_logps(logps, NO_PAIRS, torch.tensor([0]), ld_alpha).chosen.shape == (0,)


def test_log_ratios_margins_and_means() -> None:
    tokens = {"chosen_tokens": torch.tensor([4]), "rejected_tokens": torch.tensor([2])}
    policy = PairLogProbs(chosen=torch.tensor([-7.0]), rejected=torch.tensor([-6.5]), **tokens)
    reference = PairLogProbs(chosen=torch.tensor([-8.0]), rejected=torch.tensor([-6.0]), **tokens)
    pairs = Pairs(policy=policy, reference=reference)
    assert pairs.chosen_logratios.item() == 1.0
    assert pairs.rejected_logratios.item() == -0.5
    assert pairs.margins.item() == 1.5
    assert (pairs.chosen_means.item(), pairs.rejected_means.item()) == (-1.75, -3.25)
