"""A model as a scorer: which attention and layouts, and how many tokens at once."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from benchmarks.tiny_models import tiny_model
from dpo.config import ModelConfig
from dpo.data.trees import Tree
from dpo.engine.scoring import (
    CPU_TOKENS,
    GPU_TOKENS,
    PROBE_WORK,
    bare_scorer,
    make_scorer,
    not_of_text,
    settle_layout,
    token_budget,
)
from dpo.errors import UserError
from dpo.model import compiled
from dpo.model.first_blocks import in_float32
from dpo.model.load import load_model
from dpo.model.probe import Score
from dpo.model.probe_trees import trees_of
from dpo.model.scorer import SequenceScorer

IDS = np.arange(1, 60, dtype=np.int32)
TREES = trees_of((IDS[:20], [IDS[30:50], IDS[25:52]]))


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
    probed = settle_layout(Wrapper(scorer), TREES, torch.float32)
    assert probed.layout == "packed"
    assert scorer.layout == "packed"
    assert bare_scorer(Wrapper(scorer)) is scorer


class Leaky(torch.nn.Module):
    """An MLP that also hands the first part of a token's state on to the next, whatever its segment."""

    def __init__(self, mlp: torch.nn.Module, share: float) -> None:
        super().__init__()
        self.mlp, self.share = mlp, share

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.mlp(hidden) + self.share * F.pad(hidden, (0, 0, 1, 0))[:, :-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_leak_is_noticed_in_bfloat16_as_in_float32(config: ModelConfig, dtype: torch.dtype) -> None:
    """At a depth that the first blocks do not reach, and too small for the noise of bfloat16."""
    model = load_model(replace(config, dtype=str(dtype).removeprefix("torch.")))
    scorer = make_scorer(model, config)
    assert settle_layout(scorer, TREES, dtype).layout == "packed"
    last = model.transformer.h[-1]
    last.mlp = Leaky(last.mlp, 0.01)

    def copied(scorer: SequenceScorer, *rest: object, **options: object) -> Score:
        copy = deepcopy(scorer).float()  # the class cannot be made from its config
        return lambda *inputs, **options: copy(*inputs, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpo.engine.scoring.in_float32", copied)
        assert settle_layout(scorer, TREES, dtype).layout == "rows"


def test_a_model_that_is_not_causal_is_refused_with_its_class_and_number(config: ModelConfig) -> None:
    model = load_model(config)
    last = model.transformer.h[-1]
    last.mlp.forward = lambda hidden: hidden.mean(1, keepdim=True).expand_as(hidden)
    with pytest.raises(UserError, match=r"GPT2LMHeadModel cannot be used: it is not causal: .* nats"):
        settle_layout(make_scorer(model, config), TREES, torch.float32)


def test_rows_that_need_a_pass_each_are_refused_under_zero_3(config: ModelConfig) -> None:
    """Ranks with other numbers of rows would wait for each other's weights."""
    model = load_model(config)
    scorer = make_scorer(model, replace(config, share_prompts=False))
    last = model.transformer.h[-1]
    mlp = last.mlp.forward
    last.mlp.forward = lambda hidden: mlp(hidden) * (1 + 0.1 * (len(hidden) > 1))
    assert settle_layout(scorer, TREES, torch.float32).one_at_a_time
    next(model.parameters()).ds_id = 0  # as DeepSpeed marks weights that it shards
    with pytest.raises(UserError, match="under ZeRO-3 its rows cannot be computed one at a time"):
        settle_layout(scorer, TREES, torch.float32)


def test_a_model_of_which_no_part_can_be_copied_is_compared_with_its_noise_and_a_note(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = make_scorer(load_model(replace(config, dtype="bfloat16")), replace(config, dtype="bfloat16"))
    assert settle_layout(scorer, TREES, torch.bfloat16).notes == ()

    def broken(*rest: object, **options: object) -> None:
        raise KeyError("of the test")

    monkeypatch.setattr("dpo.engine.scoring.in_float32", broken)
    probed = settle_layout(scorer, TREES, torch.bfloat16)
    assert probed.layout == "packed"
    assert "no part of this model can be made in float32" in probed.notes[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_model_is_compared_in_parts(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """The whole where that is cheap, the first blocks on long trees, and both in float32."""
    made: list[int | None] = []

    def recorded(scorer: SequenceScorer, gather: object, *, num_blocks: int | None = None) -> Score:
        made.append(num_blocks)
        return in_float32(scorer, num_blocks=num_blocks)

    monkeypatch.setattr("dpo.engine.scoring.in_float32", recorded)
    model = load_model(replace(config, dtype=str(dtype).removeprefix("torch.")))
    scorer = make_scorer(model, config)
    whole = [] if dtype == torch.float32 else [None]
    assert settle_layout(scorer, TREES, dtype).layout == "packed"
    assert made == whole
    made.clear()
    between = sum(p.numel() for p in model.parameters()) * (tokens(TREES.short) + tokens(TREES.long)) / 2
    monkeypatch.setitem(PROBE_WORK, "cpu", between)
    assert settle_layout(scorer, TREES, dtype).layout == "packed"
    assert made == [*whole, 2]
    made.clear()
    monkeypatch.setitem(PROBE_WORK, "cpu", 0)
    assert settle_layout(scorer, TREES, dtype).layout == "packed"
    assert made == [2]


def tokens(trees: Sequence[Tree]) -> int:
    return sum(len(part) for prompt, completions in trees for part in (prompt, *completions))


@pytest.mark.parametrize("family", ["gemma3", "gemma3_text", "mixtral"])
def test_weights_that_no_text_reaches_are_those_of_other_towers(family: str) -> None:
    scorer = SequenceScorer(tiny_model(family))
    names = not_of_text(scorer)
    assert {name.split(".")[2] for name in names} == (
        {"vision_tower", "multi_modal_projector"} if family == "gemma3" else set()
    )
    assert all(weight.grad is None for weight in scorer.parameters())


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit.*:DeprecationWarning", "ignore:The .grad attribute:UserWarning"
)
@pytest.mark.parametrize("wrong", [False, True])
def test_compiled_blocks_are_compared_with_the_authors_model(
    config: ModelConfig, wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler whose code is wrong, and one whose code is right."""

    def backend(graph: Any, inputs: Any) -> Any:
        return lambda *args: [1.5 * part if wrong else part for part in graph(*args)]

    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "BACKEND", backend)
    scorer = make_scorer(load_model(config), replace(config, compile=True))
    if wrong:
        with pytest.raises(UserError, match="cannot be used"):
            settle_layout(scorer, TREES, torch.float32)
    else:
        assert settle_layout(scorer, TREES, torch.float32).notes == ()
    torch._dynamo.reset()


def test_compiling_without_a_compiler_is_refused_in_one_line(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> str:
        raise compiled.InvalidCxxCompiler

    monkeypatch.setattr(compiled, "get_cpp_compiler", none)
    with pytest.raises(UserError, match=r"model\.compile: true; torch found no C\+\+ compiler"):
        make_scorer(load_model(config), replace(config, compile=True))
