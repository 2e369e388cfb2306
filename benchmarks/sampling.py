"""Sampled tokens per second, with prompts computed once for all of their samples and without.

    python -m benchmarks.sampling --model MODEL --samples 4,16,64

Both ways alternate in one run, on the same prompts, and must draw the same samples.
"""

import argparse
import time
from statistics import median
from unittest.mock import patch

import numpy as np
import torch

from dpo.config import ModelConfig
from dpo.data.records import TokenIds
from dpo.distributed import device
from dpo.evaluate import sampling
from dpo.model.load import load_model

WAYS = ("shared", "apart")
ROUNDS = 3


def main() -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a folder or a hub name")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--samples", default="4,16,64", help="samples of each prompt (default: %(default)s)")
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--completion_tokens", type=int, default=24)
    args = parser.parse_args()
    model = load_model(ModelConfig(name_or_path=args.model, dtype=args.dtype))
    model.to(device())  # type: ignore[arg-type]
    print(f"{args.model}, {args.dtype}, {torch.get_num_threads()} thread(s), {device().type}")
    print("| samples of a prompt | shared, tokens/s | apart, tokens/s | shared is faster by |")
    print("|---:|---:|---:|---:|")
    for samples in map(int, args.samples.split(",")):
        rng = np.random.default_rng(0)
        shape = (max(1, 64 // samples), args.prompt_tokens)
        prompts = [*rng.integers(10, model.config.get_text_config().vocab_size, shape).astype(np.int32)]
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        drawn: dict[str, object] = {}
        for _ in range(ROUNDS):
            for way in WAYS:
                taken, drawn[way] = timed(model, prompts, samples, args.completion_tokens, way)
                seconds[way].append(taken)
        if drawn["shared"] != drawn["apart"]:
            raise SystemExit("the two ways drew different samples")
        tokens = len(prompts) * samples * args.completion_tokens
        shared, apart = (tokens / median(seconds[way]) for way in WAYS)
        print(f"| {samples} | {shared:.0f} | {apart:.0f} | {shared / apart:.2f} x |", flush=True)


def timed(
    model: torch.nn.Module, prompts: list[TokenIds], samples: int, tokens: int, way: str
) -> tuple[float, object]:
    """Seconds of drawing all samples, and their token ids; both ways are probed alike, outside the time."""
    with (
        patch.object(sampling, "together", lambda *_, **__: "padded"),
        patch.object(sampling, "can_share", lambda *_, **__: way == "shared"),
    ):
        started = time.perf_counter()
        found = sampling.sample(
            model,  # type: ignore[arg-type]
            prompts,
            num_samples=samples,
            max_new_tokens=tokens,
            temperature=1.0,
            seed=0,
            batch_size=64,
            stop_ids=[0],
            progress=None,
        )
    return time.perf_counter() - started, [[one.ids.tolist() for one in several] for several in found]


if __name__ == "__main__":
    main()
