"""ZeRO-3 shards weights while they load: no rank ever holds the whole model in private memory."""

import json
from pathlib import Path

import pytest
from ranks import output_of, start_ranks, wait
from rig import deepspeed_variables
from transformers import GPT2Config, GPT2LMHeadModel

LOAD = """
import gc, json, os, pathlib, sys, threading, time

def private():  # anonymous memory: excludes the memory-mapped weight files
    lines = pathlib.Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous"))

import deepspeed, torch
from dpo import distributed
from dpo.engine.world import start
from dpo.config import ModelConfig
from dpo.engine.frozen import frozen_scorer
from dpo.model.load import load_model

peak, watching = private(), True
def watch():
    global peak
    while watching:
        peak = max(peak, private())
        time.sleep(0.002)

def measured(load):
    global peak, watching
    gc.collect()
    before = peak = private()
    watching = True
    thread = threading.Thread(target=watch)
    thread.start()
    kept = load()
    watching = False
    thread.join()
    return max(peak, private()) - before

model = ModelConfig(name_or_path={model!r}, dtype="float32")
accelerator = start(model)
found = measured(lambda: {what})
pathlib.Path({output!r}, os.environ["RANK"]).write_text(json.dumps(found))
distributed.barrier()
sys.stdout.flush()
os._exit(0)
"""
WAYS = {
    "for training": ("load_model(model)", 3),
    "to score": ("frozen_scorer(model, sharded=True).__enter__()", None),
    "whole": ("[weight.clone() for weight in load_model(model).parameters()]", None),
}
"""The code to measure, and the ZeRO stage that the launcher sets."""
RANKS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """228 MB of float32 in files of at most 80 MB, like published large models."""
    folder = tmp_path_factory.mktemp("model")
    config = GPT2Config(n_layer=16, n_embd=512, n_head=8, vocab_size=13000, n_positions=128)
    GPT2LMHeadModel(config).save_pretrained(folder, max_shard_size="80MB")
    return folder


def peaks(model: Path, folder: Path, way: str) -> list[float]:
    """Peak private memory of loading on each rank, relative to the size of the model."""
    what, stage = WAYS[way]
    code = LOAD.format(model=str(model), what=what, output=str(folder))
    variables = deepspeed_variables(folder, stage)
    processes = start_ranks(RANKS, [], folder / "logs", variables=variables, before=code)
    assert wait(processes) == [0] * RANKS, output_of(folder / "logs")[-3000:]
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    assert size > 220e6
    return [json.loads((folder / str(rank)).read_text()) / size for rank in range(RANKS)]


@pytest.mark.parametrize("way", ["for training", "to score"])
def test_a_rank_never_holds_the_whole_model(model: Path, tmp_path: Path, way: str) -> None:
    assert (
        max(peaks(model, tmp_path, way)) < 0.75
    )  # a quarter remains; the largest weight is held temporarily


def test_the_measurement_detects_a_whole_model(model: Path, tmp_path: Path) -> None:
    assert min(peaks(model, tmp_path, "whole")) > 0.9
