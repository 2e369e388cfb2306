"""A model as a scorer: which attention and layouts, and how many tokens at once."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo.config import ModelConfig
from dpo.engine.scoring import CPU_TOKENS, GPU_TOKENS, bare_scorer, make_scorer, settle_layout, token_budget
from dpo.model.load import load_model


@pytest.fixture
def config(tiny_model: Path) -> ModelConfig:
    return ModelConfig(name_or_path=str(tiny_model), dtype="float32")


def test_the_budget_is_the_option_or_suits_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert token_budget(77) == 77
    assert token_budget(None) == (GPU_TOKENS if torch.cuda.is_available() else CPU_TOKENS)


def test_without_shared_prompts_there_is_one_row_per_completion(config: ModelConfig) -> None:
    plain = make_scorer(load_model(config), config)
    assert plain.layout != "rows"
    rows = make_scorer(load_model(config), replace(config, share_prompts=False))
    assert rows.layouts == ["rows"]
    assert rows.layout == "rows"


def test_the_layout_that_is_settled_is_set_on_the_scorer_inside_any_wrapper(config: ModelConfig) -> None:
    class Wrapper(torch.nn.Module):
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *rest: object, **options: object) -> object:
            return self.module(*rest, **options)

    scorer = make_scorer(load_model(config), config)
    scorer.layout = "rows"
    ids = np.arange(1, 6, dtype=np.int32)
    probed = settle_layout(Wrapper(scorer), (ids, [ids[:2], ids[:4]]), torch.float32)
    assert probed.layout == "packed"
    assert scorer.layout == "packed"
    assert bare_scorer(Wrapper(scorer)) is scorer


def test_in_bfloat16_layouts_are_checked_in_float32_or_a_note_says_why_not(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = np.arange(1, 6, dtype=np.int32)
    scorer = make_scorer(load_model(replace(config, dtype="bfloat16")), replace(config, dtype="bfloat16"))
    assert settle_layout(scorer, (ids, [ids[:2], ids[:4]]), torch.bfloat16).notes == ()

    def broken(*rest: object) -> None:
        raise KeyError("of the test")

    monkeypatch.setattr("dpo.engine.scoring.first_blocks", broken)
    probed = settle_layout(scorer, (ids, [ids[:2], ids[:4]]), torch.bfloat16)
    assert probed.layout == "packed"
    assert "KeyError" in probed.notes[0]
