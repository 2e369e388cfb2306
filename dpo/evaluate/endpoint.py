"""Sampling by an OpenAI-compatible server, in place of a model in this process; and which model it has.

What is given up: a server decides on batches and random numbers by itself, so that the same seed need not
give the same text again, and another precision samples from a slightly different policy. Before anything is
sampled, the log-probs of the likeliest next tokens are compared with the model's own.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo import alive, terminal
from dpo.data.records import TokenIds
from dpo.data.tokenize import bos_prefix, without_bos
from dpo.distributed import device
from dpo.errors import UserError
from dpo.evaluate.server import FIRST_TRIES, BadAnswerError, Server, first_choice, models_of

COMPARED_PROMPTS = 8
SHARES = (0.25, 0.5, 0.75, 1.0)
"""Parts of a prompt after which the next token is compared."""
LARGEST_SEED = 2**31


class KnownNext(NamedTuple):
    """What the model in this process says comes next."""

    ids: TokenIds
    """(T,) the start of a prompt."""
    logp: float
    """Log-prob of the likeliest next token, in nats, at temperature 1."""


class Written(NamedTuple):
    """A continuation as the server wrote it."""

    text: str
    """Without special tokens."""
    finished: bool
    """Whether the model ended it; else it was cut at the longest length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A model on a server."""

    server: Server
    model: str
    """Its name there."""
    tokenizer: PreTrainedTokenizerBase
    vocabulary: int
    """Entries of the model's output: this many are all, for servers that otherwise take the top 40."""
    stop_ids: Sequence[int]
    """As in `sampling.sample`; a server that does not know the option ends at its model's own."""
    takes_ids: bool
    """Whether prompts are sent as token ids; else as text, which the server tokenizes again."""

    def prompt(self, ids: TokenIds) -> list[int] | str:
        """A prompt as the server takes it: a text without the BOS that the server adds."""
        return ids.tolist() if self.takes_ids else text_prompt(ids, self.tokenizer)

    def body(self, ids: TokenIds, *, max_tokens: int, temperature: float, seed: int) -> dict[str, Any]:
        """A request for one continuation from the whole distribution, whatever the server's defaults are."""
        return {
            "model": self.model,
            "prompt": self.prompt(ids),
            "max_tokens": max_tokens,
            "temperature": temperature,
            "seed": seed,
            "n": 1,
            "stream": False,
            "stop_token_ids": [*self.stop_ids],
            "top_k": self.vocabulary,
            "top_p": 1.0,
            "min_p": 0.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "repetition_penalty": 1.0,
            "repeat_penalty": 1.0,  # its name in llama.cpp
        }


def text_prompt(ids: TokenIds, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a prompt, special tokens included, but for a BOS that tokenizing adds again."""
    rest = without_bos(ids.tolist(), bos_prefix(tokenizer))
    return str(tokenizer.decode(rest, skip_special_tokens=False, clean_up_tokenization_spaces=False))


@torch.no_grad()
def known_next(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[TokenIds]
) -> list[KnownNext]:
    """Log-probs of the likeliest tokens after the starts of some prompts, for `check_model`.

    Args:
        model: On this rank's device, in evaluation mode.
        tokenizer: Its own.
        prompts: At least one.

    Returns:
        Of up to 32 starts, those that are the same tokens when their text is tokenized again.
    """
    spread = np.linspace(0, len(prompts) - 1, min(COMPARED_PROMPTS, len(prompts))).astype(int)
    chosen = [prompts[place] for place in dict.fromkeys(spread.tolist())]
    cut = [ids[: max(1, round(share * len(ids)))] for ids in chosen for share in SHARES]
    starts = {ids.tobytes(): ids for ids in cut}
    bos = bos_prefix(tokenizer)
    found = []
    for ids in starts.values():
        again = tokenizer(text_prompt(ids, tokenizer), add_special_tokens=False, verbose=False).input_ids
        if bos + list(again) == ids.tolist():
            logits = model(torch.from_numpy(ids.astype(np.int64))[None].to(device())).logits[0, -1]
            found.append(KnownNext(ids, float(logits.float().log_softmax(-1).max())))
    return found


def connect(
    server: Server,
    name: str | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    vocabulary: int,
    stop_ids: Sequence[int],
) -> Endpoint:
    """Finds the model on the server, and whether it takes token ids.

    Args:
        server: One that runs.
        name: Of the model there; None: the only one.
        tokenizer: The policy's.
        vocabulary: Entries of the policy's output.
        stop_ids: Tokens that end a continuation.

    Raises:
        UserError: The server has no model of this name, several without one, or does not answer.
    """
    names = replace(server, tries=FIRST_TRIES).get("models", models_of)
    if name is None and len(names) != 1:
        raise UserError(f"{server.option}: {server.url} has the models {', '.join(names)}; name one of them")
    if name is not None and name not in names:
        raise UserError(f"{server.option}: {server.url} has no model {name}; it has {', '.join(names)}")
    by_ids = Endpoint(
        server=server,
        model=name or names[0],
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        stop_ids=stop_ids,
        takes_ids=True,
    )
    if _answers(by_ids, tries=1):
        return by_ids
    # llama-cpp-python takes text alone, and says status 500, as a server does that is not well for a moment
    by_text = replace(by_ids, takes_ids=False)
    _answers(by_text, tries=server.tries)
    return by_ids if _answers(by_ids, tries=1) else by_text


def _answers(endpoint: Endpoint, *, tries: int) -> bool:
    ids = np.asarray(endpoint.stop_ids[:1], np.int32)
    body = endpoint.body(ids, max_tokens=1, temperature=0.0, seed=0)
    try:
        replace(endpoint.server, tries=tries).post("completions", body, first_choice)
    except UserError:
        return False
    return True


def check_model(endpoint: Endpoint, known: Sequence[KnownNext], tolerance: float) -> None:
    """Compares the server's log-probs with the model's own, and says how far they are apart.

    Args:
        endpoint: What is asked.
        known: From `known_next`.
        tolerance: Largest mean distance, in nats.

    Raises:
        UserError: It is exceeded: another model or tokenizer; or the server gives no log-probs.
    """
    server = endpoint.server
    if not known:
        raise UserError(
            f"{server.option}: no prompt keeps its tokens when its text is tokenized again, so that the "
            "server's model cannot be compared; use the transformers sampler"
        )

    def ask(one: KnownNext) -> float:
        body = endpoint.body(one.ids, max_tokens=1, temperature=0.0, seed=0)
        return server.post("completions", {**body, "logprobs": 1}, _first_logp)

    found = np.array([*server.map(ask, known)])
    distances = np.abs(found - np.array([one.logp for one in known]))
    said = f"mean {distances.mean():.3f}, largest {distances.max():.3f} nats over {len(known)} next tokens"
    if not distances.mean() <= tolerance:
        raise UserError(
            f"{server.option}: the model {endpoint.model} of {server.url} is not the one of --model: its "
            f"log-probs differ by {said}; expected a mean of at most {tolerance:g}: serve that model, or "
            "raise --endpoint_tolerance for weights in few bits"
        )
    terminal.note(
        f"{server.url}: {endpoint.model} is the model that is meant: log-probs differ by {said}; prompts go "
        f"as {'token ids' if endpoint.takes_ids else 'text'}; the same seed need not give the same samples"
    )


def sample_endpoint(
    endpoint: Endpoint,
    prompts: Sequence[npt.NDArray[np.int32]],
    *,
    num_samples: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> list[list[Written]]:
    """`num_samples` continuations of each prompt from the full distribution, in the order of the prompts.

    Args:
        endpoint: A checked one.
        prompts: P arrays of (T_p,) token ids.
        num_samples: Continuations of each prompt.
        max_new_tokens: Longest continuation, in tokens.
        temperature: Above 0.
        seed: Of all requests, each of which gets one that follows from it and its place.

    Raises:
        UserError: The server refuses, cuts answers short, or no longer answers.
    """
    seeds = np.random.default_rng(seed).integers(LARGEST_SEED, size=len(prompts) * num_samples).tolist()

    def ask(place: int) -> Written:
        body = endpoint.body(
            prompts[place // num_samples],
            max_tokens=max_new_tokens,
            temperature=temperature,
            seed=seeds[place],
        )
        return endpoint.server.post(
            "completions", body, lambda answer: _written(answer, max_new_tokens, endpoint.server)
        )

    drawn: list[Written] = []
    with terminal.bar(len(seeds), description="sample", unit="samples") as bar:
        for one in endpoint.server.map(ask, range(len(seeds))):
            alive.step("sampling")
            drawn.append(one)
            bar.update()
    return [drawn[start : start + num_samples] for start in range(0, len(drawn), num_samples)]


def _written(answer: Any, max_new_tokens: int, server: Server) -> Written:
    """The continuation of an answer. Raises BadAnswerError, or UserError where the server cut it."""
    choice = first_choice(answer)
    text, reason = choice.get("text"), choice.get("finish_reason")
    if not isinstance(text, str) or reason not in ("stop", "length"):
        raise BadAnswerError(f"a continuation with the finish_reason {reason!r}; expected stop or length")
    written = (answer.get("usage") or {}).get("completion_tokens")
    if reason == "length" and isinstance(written, int) and written < max_new_tokens:
        raise UserError(
            f"{server.option}: {server.url} cut a continuation after {written} tokens; expected up to "
            f"{max_new_tokens}: start the server with a longer context"
        )
    return Written(text, finished=reason == "stop")


def _first_logp(answer: Any) -> float:
    """Log-prob of the first token of an answer, in the layout of OpenAI's completions or of its chats."""
    logprobs: Any = first_choice(answer).get("logprobs")
    with suppress(KeyError, IndexError, TypeError, ValueError):
        if "content" in logprobs:
            return float(logprobs["content"][0]["logprob"])
        return float(logprobs["token_logprobs"][0])
    raise BadAnswerError("an answer without log-probs, by which the server's model is checked")
