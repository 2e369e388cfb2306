"""Samples and scores are the same on one rank and on two, and every rank has all of them."""

import json
from pathlib import Path

import numpy as np
import torch
from ranks import output_of, start_ranks, wait
from transformers import GPT2Config, GPT2LMHeadModel

from dpo.evaluate.asked import Asked
from dpo.evaluate.sampling import sample
from dpo.evaluate.scoring import load_scorer, score_over_ranks


def samples_and_scores() -> dict[str, list[object]]:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3, eos_token_id=0
    )
    rng = np.random.default_rng(0)
    drawn = sample(
        GPT2LMHeadModel(config).eval(),
        [rng.integers(1, 50, length).astype(np.int32) for length in (3, 9, 5, 1, 7)],
        num_samples=3,
        max_new_tokens=6,
        temperature=0.7,
        seed=0,
        batch_size=4,  # 15 samples are 4 batches, 2 for each of two ranks
        stop_ids=[0],
        progress=None,
    )
    texts = ["a good day" if number % 3 else "a bad day" for number in range(200)]
    return {
        "samples": [[(one.ids.tolist(), one.finished) for one in several] for several in drawn],
        "scores": list(score_over_ranks(load_scorer("vader"), [*map(Asked, texts)], texts)),
    }


IN_A_RANK = """
import importlib.util, json, os, pathlib, sys
from dpo import distributed
found = importlib.util.spec_from_file_location("test_sampling", {file!r})
module = importlib.util.module_from_spec(found)
found.loader.exec_module(module)
distributed.start()
held = {{"world_size": distributed.world_size(), **module.samples_and_scores()}}
pathlib.Path({folder!r}, f"rank{{distributed.rank()}}.json").write_text(json.dumps(held))
distributed.barrier()
sys.stdout.flush()
os._exit(0)
"""


def test_two_ranks_have_the_results_of_one_process(tmp_path: Path) -> None:
    code = IN_A_RANK.format(file=__file__, folder=str(tmp_path))
    assert wait(start_ranks(2, [], tmp_path / "logs", before=code)) == [0, 0], output_of(tmp_path / "logs")
    alone = json.loads(json.dumps(samples_and_scores()))
    for rank in range(2):
        assert json.loads((tmp_path / f"rank{rank}.json").read_text()) == {"world_size": 2, **alone}
