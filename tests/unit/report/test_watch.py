"""The table of continuations during training: those of the report's sampler, escaped."""

from functools import partial
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from dpo.config import EvaluateConfig, ModelConfig
from dpo.evaluate.samples import continue_prompts, texts_of
from dpo.model.load import load_model
from dpo.report.escape import markdown_cell
from dpo.report.watch import watched_samples


def test_each_prompt_has_a_row_with_the_sample_of_the_seed(
    tiny_model: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = load_model(ModelConfig(name_or_path=str(tiny_model), dtype="float32"))
    prompts = [np.array(tokenizer(text).input_ids, np.int32) for text in ("a | day", "we like")]
    options = EvaluateConfig(completion_tokens=6, seed=3)
    eos = int(tokenizer.eos_token_id)
    draw = partial(continue_prompts, model, prompts, options, sharded=False, progress=None)
    plain = np.concatenate([continuation.ids for continuation in draw(stop_ids=[eos])])
    often = int(plain[len(plain) // 2])
    model.generation_config.eos_token_id = [often]  # as a chat model ends its turns
    lines = watched_samples(model, prompts, tokenizer, options, sharded=False).splitlines()
    drawn = draw(stop_ids=[eos, often])
    first, second = texts_of([continuation.ids for continuation in drawn], tokenizer)
    assert lines == [
        "| query | policy |",
        "|---|---|",
        f"| a \\| day | {markdown_cell(first)} |",
        f"| we like | {markdown_cell(second)} |",
    ]
