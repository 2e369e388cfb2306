"""The samplers of `sample`: a model in this process, on every rank, or an OpenAI-compatible server.

Both take prompts as token ids and give texts; a blank one is left out.
"""

import argparse
import gc
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, get_args

from data_prep.serve import served
from dpo.config import ModelConfig
from dpo.data.records import TokenIds
from dpo.errors import UserError

if TYPE_CHECKING:  # transformers takes seconds to import, and `--help` must not
    from transformers import PreTrainedTokenizerBase

SamplerName = Literal["transformers", "endpoint"]
Sampler = Callable[
    [Sequence[TokenIds], ModelConfig, "PreTrainedTokenizerBase", argparse.Namespace], list[list[str]]
]
"""Prompts, model, tokenizer and command line -> `num_samples` continuations of each prompt, on every rank."""
MINIMA = {"requests_in_flight": 1, "request_timeout": 1, "endpoint_tolerance": 0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the samplers."""
    add = parser.add_argument
    add(
        "--sampler",
        choices=get_args(SamplerName),
        default="transformers",
        help="transformers: the policy on every rank, the same samples from the same seed. endpoint: an "
        "OpenAI-compatible server (vLLM, SGLang, llama.cpp), faster, and other samples each time "
        "(default: transformers)",
    )
    server = parser.add_argument_group("options of the sampler endpoint")
    add = server.add_argument
    add("--endpoint", metavar="URL", help="the server, such as http://127.0.0.1:8000")
    add("--endpoint_model", metavar="NAME", help="its name for the policy (default: its only model)")
    add(
        "--endpoint_tolerance",
        type=float,
        default=0.1,
        metavar="NATS",
        help="the server's log-probs of next tokens may differ from --model's by this on average "
        "(default: 0.1, for bfloat16)",
    )
    add("--requests_in_flight", type=int, default=32, help="requests at once (default: 32)")
    add(
        "--request_timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="a request without an answer is sent again after this (default: 600)",
    )
    add(
        "--serve",
        metavar="COMMAND",
        help="start the server with this command, in which {model} stands for --model, and end it after "
        "sampling (default: it runs already)",
    )


def check(args: argparse.Namespace) -> None:
    """Raises UserError for options that do not go together."""
    if args.sampler == "endpoint" and args.endpoint is None:
        raise UserError("--endpoint: none; --sampler endpoint needs the server's URL")
    if args.sampler != "endpoint" and (args.endpoint or args.serve):
        raise UserError("--sampler: transformers; --endpoint and --serve belong to --sampler endpoint")


def with_transformers(
    prompts: Sequence[TokenIds],
    model: ModelConfig,
    tokenizer: "PreTrainedTokenizerBase",
    args: argparse.Namespace,
) -> list[list[str]]:
    """Samples on every rank; the same seed gives the same texts, on any number of ranks."""
    from dpo import distributed
    from dpo.evaluate.sampling import sample, stop_ids_of
    from dpo.model.load import load_model

    policy = load_model(model)
    policy.to(distributed.device())  # type: ignore[arg-type]
    samples = sample(
        policy,
        prompts,
        num_samples=args.num_samples,
        max_new_tokens=args.completion_tokens,
        temperature=args.temperature,
        seed=args.seed,
        batch_size=args.batch_size,
        stop_ids=stop_ids_of(policy, tokenizer),
        progress="sample",
    )
    return [
        [
            str(tokenizer.decode(one.ids, skip_special_tokens=True))
            if one.finished or not args.only_finished
            else ""
            for one in several
        ]
        for several in samples
    ]


def with_endpoint(
    prompts: Sequence[TokenIds],
    model: ModelConfig,
    tokenizer: "PreTrainedTokenizerBase",
    args: argparse.Namespace,
) -> list[list[str]]:
    """Asks a server, from rank 0 alone, after a comparison of its model with the policy."""
    from dpo import distributed
    from dpo.evaluate.endpoint import check_model, connect, known_next, sample_endpoint
    from dpo.evaluate.sampling import stop_ids_of
    from dpo.evaluate.server import server_at
    from dpo.model.load import load_model

    def work() -> list[list[str]]:
        server = server_at(
            args.endpoint, "--endpoint", in_flight=args.requests_in_flight, timeout=args.request_timeout
        )
        policy = load_model(model)
        policy.to(distributed.device())  # type: ignore[arg-type]
        known = known_next(policy, tokenizer, prompts)
        stop_ids, vocabulary = stop_ids_of(policy, tokenizer), policy.config.get_text_config().vocab_size
        del policy
        gc.collect()
        _empty_cache()
        with served(args.serve, model.name_or_path, server):
            endpoint = connect(
                server, args.endpoint_model, tokenizer, vocabulary=vocabulary, stop_ids=stop_ids
            )
            check_model(endpoint, known, args.endpoint_tolerance)
            samples = sample_endpoint(
                endpoint,
                prompts,
                num_samples=args.num_samples,
                max_new_tokens=args.completion_tokens,
                temperature=args.temperature,
                seed=args.seed,
            )
        return [
            [one.text if one.finished or not args.only_finished else "" for one in several]
            for several in samples
        ]

    return distributed.on_main(work)


def _empty_cache() -> None:
    """Gives the memory of the model that was compared back to the GPU, for a server on the same one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


SAMPLERS: dict[str, Sampler] = {"transformers": with_transformers, "endpoint": with_endpoint}
