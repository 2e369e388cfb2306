"""By how much rounding moves log-probs: rows beside others, in 4 and 8 bits too, and a merged adapter.

    python -m benchmarks.rounding path/to/SmolLM2-135M-Instruct        the numbers of docs/adapters.md

The audit of a cache allows a tolerance per row. The same rows are scored alone and in one batch, and the
largest difference is given as a share of it. An adapter of rank 8 with random weights is merged and not.
"""

import argparse
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from dpo.config import LoraConfig, ModelConfig
from dpo.data.trees import sequence_batch
from dpo.engine.scoring import make_scorer
from dpo.model.load import DTYPES, load_model
from dpo.model.lora import load_policy, load_start
from dpo.model.lora_export import save_adapter
from dpo.model.tokenizer import load_tokenizer
from dpo.reference.table import tolerance

TEXT = Path(__file__).parents[1] / "docs" / "how-it-works.md"
ROWS = ((0, 30), (100, 50), (300, 20), (500, 64), (700, 40), (900, 25))
"""Where a row starts in the text, after 20 tokens of prompt, and the tokens of its completion."""
PROMPT = 20
SCALE = 0.003
"""Of the adapter's second half: its base moves by about 0.04 nats a token."""

Row = tuple[np.ndarray, np.ndarray]
Dtype = Literal["float32", "bfloat16"]


def main() -> None:
    """Prints a line for each comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="a folder or a hub name")
    name = parser.parse_args().model
    torch.set_num_threads(1)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it mentions a cast for every product
    ids = np.array(load_tokenizer(ModelConfig(name_or_path=name))(TEXT.read_text()).input_ids, dtype=np.int32)
    rows = [(ids[at : at + PROMPT], ids[at + PROMPT : at + PROMPT + n]) for at, n in ROWS]
    for line in (*_beside_others(name, rows), *_merged(name, rows)):
        print(line, flush=True)


def _beside_others(name: str, rows: list[Row]) -> Iterator[str]:
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    for dtype in dtypes:
        model = ModelConfig(name_or_path=name, dtype=dtype)
        loaded = {
            "not quantized": load_model(model),
            "nf4": load_model(replace(model, quantization="nf4")),
            "int8": load_model(replace(model, quantization="int8")),
            "int8, as bitsandbytes multiplies": _in_8_bits(name, dtype),
        }
        for kind, each in loaded.items():
            alone = torch.cat([_scores(each, model, [row]) for row in rows])
            moved = (alone - _scores(each, model, rows)).abs().numpy()
            share = (moved / tolerance(dtype, np.array([n for _, n in ROWS]))).max()
            yield f"{dtype}, {kind}: rows beside others move by up to {moved.max():.2g} nats, {share:.0%}"


def _merged(name: str, rows: list[Row]) -> Iterator[str]:
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    with tempfile.TemporaryDirectory() as folder:
        base = ModelConfig(name_or_path=name, dtype="float32", lora=LoraConfig(rank=8, export="adapter"))
        policy = load_policy(base, dtype=torch.float32, seed=0)
        torch.manual_seed(1)
        trained = {name: weight for name, weight in policy.named_parameters() if weight.requires_grad}
        weights = {
            name: weight.detach() if ".lora_A." in name else torch.randn_like(weight) * SCALE
            for name, weight in trained.items()
        }
        save_adapter(policy, weights, Path(folder))
        for dtype in dtypes:
            adapter = ModelConfig(name_or_path=folder, dtype=dtype, lora=LoraConfig(start="merge"))
            two = (load_model(adapter), load_start(adapter))
            apart, merged = (_scores(each, adapter, rows, per_token=True) for each in two)
            moved = (apart - merged).square().mean().sqrt()
            yield f"{dtype}: merging moves log-probs by {moved:.2g} nats RMS a token"


def _in_8_bits(name: str, dtype: Dtype) -> PreTrainedModel:
    options = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    made: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        name, quantization_config=options, dtype=DTYPES[dtype]
    )
    made.eval()
    return made


@torch.no_grad()
def _scores(
    loaded: PreTrainedModel, model: ModelConfig, rows: list[Row], *, per_token: bool = False
) -> Tensor:
    scores: Tensor = make_scorer(loaded, model)(sequence_batch(rows), per_token=per_token)
    return scores


if __name__ == "__main__":
    main()
