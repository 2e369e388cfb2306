"""A few continuations by the policy during training, for the trackers: how its text changes."""

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo.config import EvaluateConfig
from dpo.data.records import TokenIds
from dpo.evaluate.samples import continue_prompts, texts_of
from dpo.evaluate.sampling import stop_ids_of
from dpo.report.escape import markdown_cell, prompt_end
from dpo.report.markdown import table


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
        model: The current policy, in evaluation mode.
        prompts: The same at every evaluation.
        tokenizer: The policy's.
        options: Temperature, length and seed.
        sharded: As in `sample`.
    """
    stop_ids = stop_ids_of(model, tokenizer)
    drawn = continue_prompts(model, prompts, options, stop_ids=stop_ids, sharded=sharded, progress=None)
    queries = texts_of(prompts, tokenizer)
    answers = texts_of([continuation.ids for continuation in drawn], tokenizer)
    rows = (
        (markdown_cell(prompt_end(query)), markdown_cell(answer))
        for query, answer in zip(queries, answers, strict=True)
    )
    return table(("query", "policy"), rows)
