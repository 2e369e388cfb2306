"""KL of real models that are small enough to enumerate: the estimate from samples against the exact sum."""

import itertools
import math

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from dpo.data.trees import sequence_batch
from dpo.evaluate.divergence import kl_summary
from dpo.evaluate.sampling import sample
from dpo.model.scorer import SequenceScorer

VOCABULARY, EOS, LONGEST, SAMPLES = 6, 0, 3, 4000
PROMPT = np.array([3, 1], dtype=np.int32)


def make_model(seed: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8, "vocab_size": VOCABULARY}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **dropout, initializer_range=0.6)).eval()
    assert isinstance(model, GPT2LMHeadModel)
    return model


def every_sequence() -> list[np.ndarray]:
    """Every possible draw: sequences that end with EOS, and those cut at the longest length."""
    others = range(1, VOCABULARY)
    ended = [
        [*tokens, EOS] for length in range(LONGEST) for tokens in itertools.product(others, repeat=length)
    ]
    cut = [list(tokens) for tokens in itertools.product(others, repeat=LONGEST)]
    return [np.array(tokens, dtype=np.int32) for tokens in [*ended, *cut]]


def log_probs(model: GPT2LMHeadModel, sequences: list[np.ndarray]) -> np.ndarray:
    with torch.no_grad():
        found = SequenceScorer(model)(sequence_batch([(PROMPT, sequence) for sequence in sequences], "rows"))
    return np.asarray(found.numpy())


def test_the_estimate_agrees_with_the_sum_over_all_sequences() -> None:
    policy, reference = make_model(0), make_model(1)
    everything = every_sequence()
    of_policy, of_reference = log_probs(policy, everything), log_probs(reference, everything)
    assert np.exp(of_policy).sum() == pytest.approx(1, abs=1e-5)  # the enumeration is complete
    exact = float((np.exp(of_policy) * (of_policy - of_reference)).sum())
    tokens = float((np.exp(of_policy) * [len(sequence) for sequence in everything]).sum())
    assert exact > 0.2

    (drawn,) = sample(
        policy,
        [PROMPT],
        num_samples=SAMPLES,
        max_new_tokens=LONGEST,
        temperature=1.0,
        seed=0,
        batch_size=500,
        stop_ids=[EOS],
        progress=None,
    )
    sequences = [continuation.sampled_ids() for continuation in drawn]
    found = kl_summary(
        log_probs(policy, sequences),
        log_probs(reference, sequences),
        [len(sequence) for sequence in sequences],
        np.arange(SAMPLES),
    )
    assert found["kl/sequence/low"] < exact < found["kl/sequence/high"]
    assert found["kl/sequence"] == pytest.approx(exact, rel=0.1)
    assert found["kl/token"] == pytest.approx(exact / tokens, rel=0.1)
    surprise = -float((np.exp(of_policy) * of_reference).sum()) / tokens
    assert found["perplexity/policy_samples"] == pytest.approx(math.exp(surprise), rel=0.05)
