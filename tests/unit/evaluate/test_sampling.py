"""Samples do not depend on how they are batched, follow the model's distribution, and end at EOS."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.tiny_models import tiny_model
from dpo.data.records import TokenIds
from dpo.errors import UserError
from dpo.evaluate import sampling
from dpo.evaluate.sampling import Continuation, sample, stop_ids_of

EOS = 0
VOCABULARY = 13


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=32,
        n_embd=32,
        n_layer=2,
        n_head=2,
        initializer_range=0.3,  # far from uniform, and dependent on the prompt
        bos_token_id=EOS,
        eos_token_id=EOS,
        use_cache=False,
    )
    return GPT2LMHeadModel(config).eval()


def prompts(*lengths: int) -> list[TokenIds]:
    rng = np.random.default_rng(1)
    return [rng.integers(1, VOCABULARY, length).astype(np.int32) for length in lengths]


def draw(
    model: PreTrainedModel,
    texts: Sequence[TokenIds],
    *,
    num_samples: int = 3,
    max_new_tokens: int = 8,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    stop_ids: Sequence[int] = (EOS,),
) -> list[list[Continuation]]:
    return sample(
        model,
        texts,
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        batch_size=batch_size,
        stop_ids=stop_ids,
        progress=None,
    )


def as_lists(drawn: list[list[Continuation]]) -> list[list[tuple[list[int], bool]]]:
    return [[(one.ids.tolist(), one.finished) for one in several] for several in drawn]


def next_token_probabilities(model: PreTrainedModel, prompt: TokenIds, temperature: float) -> np.ndarray:
    with torch.inference_mode():
        logits = model(torch.from_numpy(prompt.astype(np.int64))[None]).logits[0, -1]
    return (logits / temperature).softmax(-1).double().numpy()


def test_batch_size_and_padding_change_no_sample(model: PreTrainedModel) -> None:
    texts = prompts(9, 2, 5, 1, 7)
    together = as_lists(draw(model, texts, batch_size=64))
    assert as_lists(draw(model, texts, batch_size=1)) == together
    assert as_lists(draw(model, texts, batch_size=4)) == together


@pytest.mark.parametrize("family", ["rwkv", "mamba", "lfm2", "deepseek_v4", "llama"])
def test_models_that_take_padding_for_text_are_given_equal_lengths(family: str) -> None:
    model, texts = tiny_model(family), prompts(1, 5, 9, 5, 2)
    assert as_lists(draw(model, texts)) == as_lists(draw(model, texts, batch_size=1))


@pytest.mark.parametrize(
    "family", ["gpt2", "llama", "gemma3_text", "mamba", "lfm2", "deepseek_v3", "mixtral"]
)
def test_a_prompt_that_is_computed_once_has_the_samples_of_one_that_is_not(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, texts = tiny_model(family), prompts(9, 6, 2, 1, 9)
    shared = as_lists(draw(model, texts, num_samples=5, batch_size=7))
    monkeypatch.setattr(sampling, "can_share", lambda *_, **__: False)
    assert as_lists(draw(model, texts, num_samples=5, batch_size=7)) == shared


def test_a_prompt_with_several_samples_is_computed_once(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    forward = model.forward

    def counted(*args: Any, **named: Any) -> Any:
        computed.append(named["input_ids"].numel())
        return forward(*args, **named)

    monkeypatch.setattr(model, "forward", counted)
    monkeypatch.setattr(sampling, "together", lambda *_, **__: "padded")
    monkeypatch.setattr(sampling, "can_share", lambda *_, **__: True)
    (prompt,) = prompts(20)
    draw(model, [prompt], num_samples=10, max_new_tokens=1)
    assert computed == [19, 10]  # the prompt but for its last token, then that token of each sample


def test_a_sample_depends_only_on_its_own_indices(model: PreTrainedModel) -> None:
    texts = prompts(4, 6, 3)
    whole = as_lists(draw(model, texts, num_samples=4))
    assert as_lists(draw(model, texts[:2], num_samples=2)) == [several[:2] for several in whole[:2]]


def test_samples_and_seeds_differ(model: PreTrainedModel) -> None:
    (prompt,) = prompts(4)
    same_prompt_twice = as_lists(draw(model, [prompt, prompt], num_samples=4))
    first, second = same_prompt_twice
    assert len({str(one) for one in first + second}) > 4
    assert first != second
    assert as_lists(draw(model, [prompt], num_samples=4, seed=1))[0] != first


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_first_tokens_follow_the_full_distribution(model: PreTrainedModel, temperature: float) -> None:
    (prompt,) = prompts(5)
    expected = next_token_probabilities(model, prompt, temperature)
    num_samples = 4000
    drawn = draw(
        model, [prompt], num_samples=num_samples, max_new_tokens=1, temperature=temperature, batch_size=4000
    )[0]
    counts = Counter(EOS if one.finished else int(one.ids[0]) for one in drawn)
    observed = np.array([counts[token] for token in range(VOCABULARY)])
    # Pearson's chi-squared: its mean is the number of degrees of freedom, at most 12, and its 99.9 % quantile
    # 32.9. Tokens with an expected count below 5 share a cell.
    cell = np.where(expected * num_samples < 5, VOCABULARY, np.arange(VOCABULARY))
    expected_counts = np.bincount(cell, expected * num_samples, VOCABULARY + 1)
    observed_counts = np.bincount(cell, observed, VOCABULARY + 1)
    filled = expected_counts > 0
    chi_squared = ((observed_counts - expected_counts)[filled] ** 2 / expected_counts[filled]).sum()
    assert filled.sum() >= 5
    assert chi_squared < 32.9


def test_later_tokens_follow_the_distribution_given_earlier_ones(model: PreTrainedModel) -> None:
    (prompt,) = prompts(5)
    drawn = draw(model, [prompt], num_samples=4000, max_new_tokens=2, batch_size=4000)[0]
    pairs = [tuple(one.ids.tolist()) for one in drawn if len(one.ids)]
    first, count = Counter(pair[0] for pair in pairs).most_common(1)[0]
    expected = next_token_probabilities(model, np.append(prompt, np.int32(first)), 1.0)
    observed = Counter(pair[1] if len(pair) == 2 else EOS for pair in pairs if pair[0] == first)
    for token in range(VOCABULARY):
        deviation = 4 * np.sqrt(expected[token] * (1 - expected[token]) / count) + 1 / count
        assert observed[token] / count == pytest.approx(expected[token], abs=deviation)


def test_temperature_0_takes_the_most_likely_token(model: PreTrainedModel) -> None:
    texts = prompts(3, 6)
    for prompt, several in zip(texts, draw(model, texts, num_samples=2, temperature=0), strict=True):
        assert several[0].ids.tolist() == several[1].ids.tolist()
        ids = prompt
        for token in several[0].sampled_ids():
            assert token == next_token_probabilities(model, ids, 1.0).argmax()
            ids = np.append(ids, token)


def test_a_continuation_ends_before_eos_or_at_the_longest_length(model: PreTrainedModel) -> None:
    drawn = [one for several in draw(model, prompts(3, 5), num_samples=40) for one in several]
    for one in drawn:
        assert one.ids.dtype == np.int32
        assert EOS not in one.ids
        assert one.finished or len(one.ids) == 8
    assert {one.finished for one in drawn} == {True, False}


def test_sampled_ids_count_eos_where_it_was_drawn() -> None:
    ids = np.array([4, 5], dtype=np.int32)
    assert Continuation(ids, stop=EOS).sampled_ids().tolist() == [4, 5, EOS]
    assert Continuation(ids, stop=None).sampled_ids().tolist() == [4, 5]


SETTINGS_OF_STOPS = [(None, (EOS,)), (EOS, (EOS,)), (5, (EOS, 5)), ([5, EOS, 7], (EOS, 5, 7))]


@pytest.mark.parametrize(("listed", "expected"), SETTINGS_OF_STOPS)
def test_the_tokenizers_eos_and_those_of_the_models_settings_end_a_continuation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, listed: Any, expected: tuple[int, ...]
) -> None:
    assert tokenizer.eos_token_id == EOS
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = listed
    try:
        assert stop_ids_of(model, tokenizer) == expected
    finally:
        model.generation_config.eos_token_id = before


def test_every_stop_token_ends_a_continuation_as_eos_does(model: PreTrainedModel) -> None:
    stops = [EOS, 5, 7]
    texts = prompts(3, 5)
    plain = [one for several in draw(model, texts, num_samples=40) for one in several]
    drawn = [one for several in draw(model, texts, num_samples=40, stop_ids=stops) for one in several]
    for long, short in zip(plain, drawn, strict=True):  # the same random streams: the same tokens up to it
        tokens = long.sampled_ids().tolist()
        cut = next((i for i, token in enumerate(tokens) if token in stops), None)
        expected = tokens if cut is None else tokens[: cut + 1]
        assert short.sampled_ids().tolist() == expected
        assert short.stop == (None if cut is None else tokens[cut])
    assert {one.stop for one in drawn} == {None, *stops}


def test_the_models_own_generation_settings_are_ignored_and_restored(model: PreTrainedModel) -> None:
    texts = prompts(4)
    expected = as_lists(draw(model, texts))
    settings = model.generation_config
    settings.update(do_sample=True, top_k=1, repetition_penalty=9.0, max_length=20, suppress_tokens=[1, 2, 3])
    try:
        assert as_lists(draw(model, texts)) == expected
        assert model.generation_config is settings
    finally:
        settings.update(
            do_sample=None, top_k=None, repetition_penalty=None, max_length=None, suppress_tokens=None
        )


def test_two_models_with_the_same_seed_share_their_randomness(model: PreTrainedModel) -> None:
    # The logits of the other model are almost the same, and so are almost all of its samples; independent
    # samples of 8 tokens would hardly ever agree.
    other = GPT2LMHeadModel(model.config).eval()
    other.load_state_dict({name: value * 1.0005 for name, value in model.state_dict().items()})
    texts = prompts(4, 6)
    pairs = zip(draw(model, texts, num_samples=20), draw(other, texts, num_samples=20), strict=True)
    same = [
        a.ids.tolist() == b.ids.tolist() for left, right in pairs for a, b in zip(left, right, strict=True)
    ]
    assert np.mean(same) > 0.8


def test_no_prompts_give_no_samples(model: PreTrainedModel) -> None:
    assert draw(model, []) == []


def test_sequences_that_exceed_the_positions_are_an_error(model: PreTrainedModel) -> None:
    assert draw(model, prompts(24), num_samples=1)
    with pytest.raises(UserError, match=r"25 tokens .* 8 .* 32"):
        draw(model, prompts(25))
