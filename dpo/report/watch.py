"""A few continuations by a policy in training, so that one can scroll through what it learns."""

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo.config import EvaluateConfig
from dpo.data.records import TokenIds
from dpo.evaluate.sampling import sample
from dpo.report.markdown import escape, tail


def watched_samples(
    model: PreTrainedModel,
    prompts: Sequence[TokenIds],
    tokenizer: PreTrainedTokenizerBase,
    options: EvaluateConfig,
    *,
    sharded: bool,
) -> str:
    """The table query | policy in Markdown, with the seed of the report's samples. All ranks must call it.

    Args:
        model: The policy as it is, in evaluation mode.
        prompts: The same at every evaluation.
        tokenizer: The policy's.
        options: Temperature, length and seed.
        sharded: As in `sample`.
    """
    eos = tokenizer.eos_token_id
    drawn = sample(
        model,
        prompts,
        num_samples=1,
        max_new_tokens=options.completion_tokens,
        temperature=options.temperature,
        seed=options.seed,
        batch_size=options.batch_size,
        eos_token_id=int(eos),
        progress=None,
        sharded=sharded,
    )
    lines = ["| query | policy |", "|---|---|"]
    for prompt, (continuation,) in zip(prompts, drawn, strict=True):
        texts = (str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in (prompt, continuation.ids))
        query, policy = texts
        lines.append(f"| {escape(tail(query))} | {escape(policy)} |")
    return "\n".join(lines)
