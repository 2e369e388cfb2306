"""Sampled tokens per second: prompts computed once for all of their samples, and for each; and by a server.

    python -m benchmarks.sampling --model MODEL --samples 4,16,64
    python -m benchmarks.sampling --model MODEL --samples 4 --endpoint http://127.0.0.1:8000

The ways alternate in one run, on the same prompts; the first two must draw the same samples. A server has the
same model, which is not checked here: its precision may differ.
"""

import argparse
import time
from pathlib import Path
from statistics import median
from unittest.mock import patch

import numpy as np
import torch
from transformers import PreTrainedModel

from dpo.config import ModelConfig
from dpo.data.records import TokenIds
from dpo.distributed import device
from dpo.evaluate import sampling
from dpo.evaluate.endpoint import Endpoint, connect, sample_endpoint
from dpo.evaluate.sampling import stop_ids_of
from dpo.evaluate.server import server_at
from dpo.model.load import load_model
from dpo.model.tokenizer import load_tokenizer

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
    parser.add_argument("--sequences", type=int, default=64, help="sampled in all (default: %(default)s)")
    parser.add_argument("--text", help="a text that prompts are cut from (default: random tokens)")
    parser.add_argument("--endpoint", metavar="URL", help="also time this server")
    parser.add_argument("--requests_in_flight", type=int, default=16)
    args = parser.parse_args()
    model = load_model(ModelConfig(name_or_path=args.model, dtype=args.dtype))
    model.to(device())  # type: ignore[arg-type]
    print(f"{args.model}, {args.dtype}, {torch.get_num_threads()} thread(s), {device().type}")
    server = _server(args, model) if args.endpoint else None
    more = " server, tokens/s |" if server else ""
    print(f"| samples of a prompt | shared, tokens/s | apart, tokens/s | shared is faster by |{more}")
    print("|---:|---:|---:|---:|" + ("---:|" if server else ""))
    for samples in map(int, args.samples.split(",")):
        prompts = _prompts(args, model, max(1, args.sequences // samples))
        speed: dict[str, list[float]] = {way: [] for way in (*WAYS, "server")}
        drawn: dict[str, object] = {}
        for _ in range(ROUNDS):
            for way in WAYS:
                taken, written = timed(model, prompts, samples, args.completion_tokens, way)
                drawn[way] = written
                speed[way].append(sum(len(ids) for several in written for ids in several) / taken)
            if server:
                speed["server"].append(timed_server(server, prompts, samples, args.completion_tokens))
        if drawn["shared"] != drawn["apart"]:
            raise SystemExit("the two ways drew different samples")
        shared, apart = (median(speed[way]) for way in WAYS)
        last = f" {median(speed['server']):.0f} |" if server else ""
        print(f"| {samples} | {shared:.0f} | {apart:.0f} | {shared / apart:.2f} x |{last}", flush=True)


def _prompts(args: argparse.Namespace, model: PreTrainedModel, number: int) -> list[TokenIds]:
    """Prompts of one length, in token ids."""
    shape = (number, args.prompt_tokens)
    if args.text is None:
        rng = np.random.default_rng(0)
        return [*rng.integers(10, model.config.get_text_config().vocab_size, shape).astype(np.int32)]
    tokenizer = load_tokenizer(ModelConfig(name_or_path=args.model))
    with Path(args.text).open() as file:
        ids = tokenizer(file.read(20 * number * args.prompt_tokens), verbose=False).input_ids
    return [*np.asarray(ids[: shape[0] * shape[1]], np.int32).reshape(shape)]


def _server(args: argparse.Namespace, model: PreTrainedModel) -> Endpoint:
    tokenizer = load_tokenizer(ModelConfig(name_or_path=args.model))
    return connect(
        server_at(args.endpoint, "--endpoint", in_flight=args.requests_in_flight),
        None,
        tokenizer,
        vocabulary=model.config.get_text_config().vocab_size,
        stop_ids=stop_ids_of(model, tokenizer),
    )


def timed_server(server: Endpoint, prompts: list[TokenIds], samples: int, tokens: int) -> float:
    """Tokens a second of drawing all samples from the server, counted in their texts."""
    started = time.perf_counter()
    found = sample_endpoint(
        server, prompts, num_samples=samples, max_new_tokens=tokens, temperature=1.0, seed=0
    )
    taken = time.perf_counter() - started
    texts = [one.text for several in found for one in several]
    return sum(len(server.tokenizer(text, add_special_tokens=False).input_ids) for text in texts) / taken


def timed(
    model: PreTrainedModel, prompts: list[TokenIds], samples: int, tokens: int, way: str
) -> tuple[float, list[list[list[int]]]]:
    """Seconds of drawing all samples, and their token ids; both ways are probed alike, outside the time."""
    with (
        patch.object(sampling, "together", lambda *_, **__: "padded"),
        patch.object(sampling, "can_share", lambda *_, **__: way == "shared"),
    ):
        started = time.perf_counter()
        found = sampling.sample(
            model,
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
