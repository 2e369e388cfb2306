"""Samples of two models: which prompts are continued, their log-probs, and how the samples compare."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from dpo.config import EvaluateConfig, ModelConfig
from dpo.data.dataset import TokenizedDataset, map_dataset, write_dataset
from dpo.data.records import Pair, TokenizedGroup
from dpo.data.trees import sequence_batch
from dpo.evaluate.asked import Asked
from dpo.evaluate.samples import (
    Samples,
    compare,
    continue_prompts,
    held_out_prompts,
    log_probs,
    texts_of,
)
from dpo.evaluate.sampling import Continuation
from dpo.evaluate.scoring import VaderScorer
from dpo.model.load import load_model
from dpo.model.scorer import SequenceScorer


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


@pytest.fixture
def prompts_data(tmp_path: Path) -> TokenizedDataset:
    prompts = [(1, 2, 3, 4), (5,), (1, 2, 3, 4), (6, 3, 4), (7, 8)]
    groups = [
        TokenizedGroup(prompt=ids(*prompt), completions=(ids(1), ids(2)), pairs=(Pair(0, 1),))
        for prompt in prompts
    ]
    write_dataset(groups, tmp_path / "prompts", Counter())
    return map_dataset(tmp_path / "prompts", "digest")


def selected(data: TokenizedDataset, number: int, positions: int | None) -> list[list[int]]:
    return [prompt.tolist() for prompt in held_out_prompts(data, number, 10, positions)]


def test_the_first_distinct_prompts_are_continued(prompts_data: TokenizedDataset) -> None:
    assert selected(prompts_data, 3, None) == [[1, 2, 3, 4], [5], [6, 3, 4]]
    assert selected(prompts_data, 99, None) == [[1, 2, 3, 4], [5], [6, 3, 4], [7, 8]]


def test_a_prompt_is_cut_on_the_left_if_its_continuation_needs_room(
    prompts_data: TokenizedDataset,
) -> None:
    assert selected(prompts_data, 9, 13) == [[2, 3, 4], [5], [6, 3, 4], [7, 8]]
    # With room for two tokens the first and the fourth become the same prompt.
    assert selected(prompts_data, 9, 12) == [[3, 4], [5], [7, 8]]


@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_log_probs_come_in_order_whatever_the_budget(tiny_model: Path, budget: int) -> None:
    rng = np.random.default_rng(0)
    sequences = [
        (rng.integers(0, 280, n % 5 + 1).astype(np.int32), rng.integers(0, 280, n % 7 + 1).astype(np.int32))
        for n in range(11)
    ]
    scorer = SequenceScorer(load_model(ModelConfig(name_or_path=str(tiny_model), dtype="float32")))
    with torch.no_grad():
        expected = [float(scorer(sequence_batch([sequence]))) for sequence in sequences]
    assert log_probs(scorer, sequences, scorer.layout, budget) == pytest.approx(expected, abs=1e-4)


def test_samples_of_the_kl_have_their_own_seed_and_temperature_1(tiny_model: Path) -> None:
    model = load_model(ModelConfig(name_or_path=str(tiny_model), dtype="float32"))
    prompts = [ids(5, 6), ids(7)]

    def drawn(temperature: float, seed: int, *, for_kl: bool) -> list[list[int]]:
        options = EvaluateConfig(completion_tokens=6, temperature=temperature, seed=seed)
        found = continue_prompts(
            model, prompts, options, stop_ids=[0], sharded=False, progress=None, for_kl=for_kl
        )
        return [continuation.ids.tolist() for continuation in found]

    assert drawn(0.3, 0, for_kl=True) == drawn(1.0, 1, for_kl=False)
    assert drawn(0.3, 0, for_kl=True) != drawn(0.3, 0, for_kl=False)


ASKED = [Asked("prompt 0"), Asked("prompt 1")]


def both(tokenizer: PreTrainedTokenizerFast, reference: list[str], policy: list[str]) -> Samples:
    def continuations(texts: list[str]) -> list[Continuation]:
        return [
            Continuation(ids(*tokenizer(text).input_ids), stop=int(tokenizer.eos_token_id)) for text in texts
        ]

    return Samples(
        prompts=[ids(*tokenizer(f"prompt {n}").input_ids) for n in range(len(policy))],
        reference=continuations(reference),
        policy=continuations(policy),
        seed=7,
        kl={"kl/sequence": 1.5},
    )


def test_scores_win_rate_and_repetition_by_hand(tokenizer: PreTrainedTokenizerFast) -> None:
    reference, policy = ["a bad day", "a day"], ["a good day", "a day a day"]
    samples = both(tokenizer, reference, policy)
    found = compare(samples, ASKED, "vader", tokenizer)
    assert (found.prompts, found.reference, found.policy) == (["prompt 0", "prompt 1"], reference, policy)
    assert found.seed == 7
    assert found.reference_scores == VaderScorer().score(ASKED, reference)
    assert found.policy_scores == VaderScorer().score(ASKED, policy)
    summary = found.summary
    assert summary["score/policy"] == pytest.approx(np.mean(VaderScorer().score(ASKED, policy)))
    assert (summary["positive_share/reference"], summary["positive_share/policy"]) == (0.0, 0.5)
    assert summary["win_rate"] == 0.75  # one win, one tie
    assert summary["kl/sequence"] == 1.5
    assert summary["distinct_2/policy"] == 4 / 5  # a good, good day, a day, day a, a day
    assert summary["repetition/policy"] == 1 / 5
    assert summary["distinct_texts/reference"] == 1.0
    lengths = [len(continuation.ids) for continuation in samples.policy]
    assert summary["sample_tokens/policy"] == pytest.approx(np.mean(lengths))


def test_without_a_scorer_only_the_texts_are_compared(tokenizer: PreTrainedTokenizerFast) -> None:
    found = compare(both(tokenizer, ["a", "a"], ["a", "b"]), ASKED, None, tokenizer)
    assert found.reference_scores is None
    assert found.policy_scores is None
    assert not any(name.startswith(("score/", "positive_share/", "win_rate")) for name in found.summary)
    assert (found.summary["distinct_texts/reference"], found.summary["distinct_texts/policy"]) == (0.5, 1.0)


def test_texts_have_no_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    sequence = ids(*tokenizer("a day").input_ids, tokenizer.eos_token_id)
    assert texts_of([sequence, ids()], tokenizer) == ["a day", ""]


def test_special_tokens_part_turns_and_leave_no_other_trace(tokenizer: PreTrainedTokenizerFast) -> None:
    """As a chat template writes them: who speaks, what they say, the next one."""
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    chat = "<|im_start|>user\nIs it good?<|im_end|>\n<|im_start|>assistant\n"
    plain = "<|endoftext|>  a good day <|endoftext|>"
    ids = [np.asarray(tokenizer(text)["input_ids"], np.int32) for text in (chat, plain, "", "<|endoftext|>")]
    assert texts_of(ids, tokenizer) == ["user\nIs it good?\nassistant", "  a good day ", "", ""]
