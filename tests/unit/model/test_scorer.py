"""The scorer against a plain softmax over the whole vocabulary, in float64; padding; no dropout (law 0)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from dpo.config import ModelConfig
from dpo.data.records import TokenIds
from dpo.data.trees import sequence_batch
from dpo.model.load import load_model
from dpo.model.scorer import SequenceScorer, sequence_sums

Sequence = tuple[TokenIds, TokenIds]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> PreTrainedModel:
    return load_model(ModelConfig(name_or_path=str(tiny_model), dtype="float32"))


def random_sequences(number: int, seed: int = 0) -> list[Sequence]:
    rng = np.random.default_rng(seed)
    return [
        (
            rng.integers(0, 280, rng.integers(1, 20)).astype(np.int32),
            rng.integers(0, 280, rng.integers(1, 30)).astype(np.int32),
        )
        for _ in range(number)
    ]


def naive_logps(model: PreTrainedModel, sequence: Sequence) -> Tensor:
    """(N,) log p of each completion token: one sequence at a time, full softmax, float64."""
    prompt, completion = sequence
    ids = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64))
    with torch.no_grad():
        probabilities = model(input_ids=ids[None]).logits[0].softmax(-1)
    positions = range(len(prompt) - 1, len(ids) - 1)
    return torch.stack([probabilities[position, ids[position + 1]] for position in positions]).log()


def test_log_probs_are_those_of_a_full_softmax(model: PreTrainedModel, tiny_model: Path) -> None:
    sequences = random_sequences(12)
    exact = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64).eval()
    expected = [naive_logps(exact, sequence) for sequence in sequences]
    with torch.no_grad():
        batch = sequence_batch(sequences)
        scorer = SequenceScorer(model)
        sums, tokens = scorer(batch), scorer(batch, per_token=True)
    assert (sums.dtype, tokens.dtype) == (torch.float64, torch.float32)
    torch.testing.assert_close(tokens.double(), torch.cat(expected), rtol=0, atol=1e-5)
    torch.testing.assert_close(sums, torch.stack([e.sum() for e in expected]), rtol=0, atol=1e-4)
    assert sums.max() < -1  # large enough that an error of one position would change them


def test_aligned_log_probs_are_beside_those_of_a_sample(model: PreTrainedModel) -> None:
    sequences = random_sequences(5)
    batch, scorer = sequence_batch(sequences), SequenceScorer(model)
    found = scorer(batch, aligned=True)
    assert found[:, 0].tolist() == scorer(batch).tolist()
    expected = []
    for prompt, completion in sequences:
        ids = torch.from_numpy(np.concatenate([prompt, completion])).long()
        with torch.no_grad():
            logps = model(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        own = logps.gather(1, ids[len(prompt) :, None])[:, 0]
        expected.append((own - (2 * logps).logsumexp(1)).sum())
    torch.testing.assert_close(found[:, 1].detach(), torch.stack(expected), rtol=0, atol=1e-4)
    torch.testing.assert_close(scorer(batch, aligned=True, own_projection=True), found, rtol=0, atol=1e-4)
    (weight,) = [p for n, p in model.named_parameters() if n.endswith("wte.weight")]
    (slope,) = torch.autograd.grad(found.sum(), weight)
    (plain,) = torch.autograd.grad(scorer(batch).sum(), weight)
    torch.testing.assert_close(slope, plain)
    assert scorer(sequence_batch([]), aligned=True).tolist() == [[0.0, 0.0]]


def test_sums_are_those_of_the_tokens_row_by_row(model: PreTrainedModel) -> None:
    batch = sequence_batch(random_sequences(6))
    with torch.no_grad():
        tokens = SequenceScorer(model)(batch, per_token=True)
        assert torch.equal(sequence_sums(tokens, batch), SequenceScorer(model)(batch))
    expected = [row.double().sum() for row in tokens.split(batch.num_tokens.tolist())]
    torch.testing.assert_close(sequence_sums(tokens, batch), torch.stack(expected), rtol=0, atol=1e-9)


def test_an_empty_batch_has_no_tokens_and_one_sum_of_zero(model: PreTrainedModel) -> None:
    batch = sequence_batch([])
    tokens = SequenceScorer(model)(batch, per_token=True)
    assert tokens.shape == (0,)
    assert sequence_sums(tokens, batch).tolist() == [0.0]


def test_our_projection_agrees_with_the_models_own_logits(model: PreTrainedModel) -> None:
    batch, scorer = sequence_batch(random_sequences(5)), SequenceScorer(model)
    with torch.no_grad():
        torch.testing.assert_close(scorer(batch), scorer(batch, own_projection=True), rtol=0, atol=1e-5)
        scorer.uses_projection = False
        assert torch.equal(scorer(batch), scorer(batch, own_projection=True))


def test_padding_does_not_matter(model: PreTrainedModel) -> None:
    sequences = random_sequences(6)
    scorer = SequenceScorer(model)
    with torch.no_grad():
        together = scorer(sequence_batch(sequences))
        alone = torch.cat([scorer(sequence_batch([sequence])) for sequence in sequences])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)


def test_the_ids_in_the_padding_do_not_matter(model: PreTrainedModel) -> None:
    short, long = random_sequences(40)[0], (np.arange(20, dtype=np.int32), np.arange(30, dtype=np.int32))
    batch = sequence_batch([short, long])
    with torch.no_grad():
        before = SequenceScorer(model)(batch)
        batch.input_ids[0, len(short[0]) + len(short[1]) :] = 123
        assert torch.equal(SequenceScorer(model)(batch), before)


def test_a_row_without_a_completion_scores_zero_and_has_a_gradient(model: PreTrainedModel) -> None:
    scorer = SequenceScorer(model)
    logps = scorer(sequence_batch([]))
    assert logps.tolist() == [0.0]
    logps.sum().backward()  # a rank without work also takes part in the backward pass
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    assert gradients
    assert all(not gradient.any() for gradient in gradients)


def test_gradients_are_those_of_the_naive_computation(model: PreTrainedModel) -> None:
    sequences = random_sequences(3)
    weight = model.get_input_embeddings().weight

    def gradient(loss: Tensor) -> Tensor:
        model.zero_grad()
        loss.backward()
        assert weight.grad is not None
        found = weight.grad.clone()
        model.zero_grad()
        return found

    by_scorer = gradient(SequenceScorer(model)(sequence_batch(sequences)).sum())
    total = torch.zeros((), dtype=torch.float64)
    for prompt, completion in sequences:
        ids = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64))
        logps = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        at = torch.arange(len(prompt) - 1, len(ids) - 1)
        total = total + logps[at, ids[at + 1]].double().sum()
    torch.testing.assert_close(by_scorer, gradient(total), rtol=1e-4, atol=1e-4)


def test_training_mode_gives_the_same_log_probs_as_evaluation(model: PreTrainedModel) -> None:
    batch = sequence_batch(random_sequences(4))
    with torch.no_grad():
        expected = SequenceScorer(model)(batch)
        try:
            found = SequenceScorer(model.train())(batch)
        finally:
            model.eval()
    assert torch.equal(found, expected)


def test_the_tiny_model_has_dropout_to_remove(tiny_model: Path) -> None:
    # Without it the test above could not fail.
    raw = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).train()
    batch = sequence_batch(random_sequences(4))
    with torch.no_grad():
        first, second = SequenceScorer(raw)(batch), SequenceScorer(raw)(batch)
    assert not torch.equal(first, second)
