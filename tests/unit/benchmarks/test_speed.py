import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from benchmarks import speed, textbook
from benchmarks.speed_data import write_model
from dpo.data.trees import sequence_batch
from dpo.errors import UserError
from dpo.model.load import ready
from dpo.model.scorer import SequenceScorer


def measurement(system: str, pairs: int, seconds: float, memory: int) -> speed.Measurement:
    return speed.Measurement(
        system=system, work="hh", task="train", pairs=pairs, seconds=seconds,
        tokens=pairs * 100, peak_bytes=memory, losses=[0.7, 0.6],
    )  # fmt: skip


def test_the_matrices_of_a_layer_are_counted_as_gpt2_has_them() -> None:
    config = GPT2Config(n_embd=64, n_layer=2, n_head=1, vocab_size=10, n_positions=8)
    layers = GPT2LMHeadModel(config).transformer.h
    assert sum(p.numel() for p in layers.parameters() if p.dim() == 2) == 2 * 12 * 64 * 64


def test_the_textbook_path_gives_the_log_probs_that_ours_gives() -> None:
    torch.manual_seed(0)
    options = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": 0.2}
    config = GPT2Config(n_embd=64, n_layer=2, n_head=1, vocab_size=50, n_positions=32, **options)
    model = GPT2LMHeadModel(config).eval()
    chosen, rejected = ([3, 1, 4, 1, 5], 2), ([3, 1, 9], 2)
    other = ([2, 7, 1, 8, 2, 8], 1), ([2, 8, 4, 5], 1)
    with torch.no_grad():
        theirs = torch.cat(textbook.completion_logps(model, textbook.pad([(chosen, rejected), other])))
        sequences = [
            (np.array(ids[:prompt], dtype=np.int32), np.array(ids[prompt:], dtype=np.int32))
            for ids, prompt in (chosen, other[0], rejected, other[1])
        ]
        ours = SequenceScorer(ready(model))(sequence_batch(sequences))
    torch.testing.assert_close(theirs.double(), ours, rtol=1e-5, atol=1e-5)


def test_ratios_are_of_medians() -> None:
    measured = [
        measurement(system, 10, seconds, memory)
        for system, times, memory in (("ours", (1, 2, 100), 3), ("trl", (8, 10, 1), 6))
        for seconds in times
    ]
    facts = {"hh": {"useful_flops": {"train": 10 * 1e9}}}
    lines = speed.tables(measured, facts, peak=10e9)
    (ours,) = [line for line in lines if "| ours |" in line]
    assert "| 5.000 (0.100 to 10.000) | 100.0 | 5.0 | 0.50 |" in ours  # of 10, 5, 0.1 pairs/s
    assert lines[-1] == "| hh | train | trl | 4.00 x | 0.50 x | 0.0e+00 |"  # of 1.25, 1, 10 pairs/s


def test_losses_of_different_runs_are_not_compared() -> None:
    assert speed.largest_difference([1.0, 2.2], [1.0, 2.0]) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="longer"):
        speed.largest_difference([1.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--hh", "nowhere.jsonl", "--work", "hh"], "--hh: nowhere.jsonl does not exist"),
        (["--books", "nowhere.txt", "--work", "best4"], "--books: nowhere.txt does not exist"),
        (["--pairs_per_step", "10", "--work", "best4"], "--pairs_per_step: 10; expected a multiple of 4"),
        (["--width", "100"], "--width: 100; expected a multiple of 64"),
        (["--rounds", "0"], "--rounds: 0; expected at least 1"),
        (["--gpu", "--systems", "ours", "textbook"], "--systems: textbook is written for CPUs"),
        (["--dtype", "bfloat16", "--systems", "textbook"], "--dtype: bfloat16; the textbook path computes"),
    ],
)
def test_bad_usage_is_one_message(
    given: list[str], says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    there = tmp_path / "there"
    there.touch()
    files = ["--hh", str(there), "--books", str(there), "--tokenizer", str(there)]
    monkeypatch.setattr(sys, "argv", ["speed", "--systems", "ours", *files, *given])
    with pytest.raises(UserError) as raised:
        speed.check(speed.arguments())
    assert says in str(raised.value)


def test_trl_without_its_environment_names_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = ["--hh", str(tmp_path), "--books", str(tmp_path), "--tokenizer", str(tmp_path)]
    files += ["--peers_python", str(tmp_path / "none")]
    monkeypatch.setattr(sys, "argv", ["speed", *files])
    with pytest.raises(UserError, match="make bench-peers"):
        speed.check(speed.arguments())


def test_on_a_gpu_all_but_the_textbook_path_take_part_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["speed", "--gpu"])
    given = speed.arguments()
    assert (given.systems, given.dtype) == (["ours", "trl"], "bfloat16")


@pytest.mark.parametrize("family", speed.FAMILIES)
def test_a_model_of_each_family_is_written(
    family: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    settings = speed.Settings(
        folder=str(tmp_path), hh="", books="", tokenizer="", layers=2, width=128, steps=1, pairs_per_step=3,
        pairs_per_micro_batch=1, max_tokens_per_micro_batch=64, learning_rate=1e-6, beta=0.1, max_length=64,
        threads=1, seed=0, family=family,
    )  # fmt: skip
    config = write_model(settings, tokenizer)
    assert config.model_type == family
    assert AutoConfig.from_pretrained(settings.model).num_hidden_layers == 2
