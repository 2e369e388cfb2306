"""What several commands open: defaults of the configuration, and data in one line."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpo.commands.inputs import asked_prompts, described, open_data, with_reference
from dpo.commands.labels import check_labels
from dpo.commands.settings import settings_of
from dpo.commands.sft import refuse_undesirable
from dpo.commands.train import cautions
from dpo.config import Config, DataConfig, LossConfig, ModelConfig, SftConfig, SftModelConfig, flat, resolved
from dpo.data.dataset import TokenizedDataset
from dpo.errors import UserError
from dpo.evaluate.samples import held_out_prompts
from dpo.reference.values import ReferenceUse

CONFIG = Config(model=ModelConfig(name_or_path="m"), data=DataConfig(train="d"))
SFT = SftConfig(model=SftModelConfig(name_or_path="m"), data=DataConfig(train="d"))


@pytest.mark.parametrize("config", [CONFIG, SFT], ids=["train", "sft"])
def test_the_defaults_are_those_of_a_configuration_that_gives_only_what_it_must(config: Config) -> None:
    settings = settings_of(config)
    given = {"model.name_or_path", "data.train"}
    values = flat(settings.values)
    assert values == flat(resolved(config))
    assert {key: value for key, value in settings.defaults.items() if key not in given} == {
        key: value for key, value in values.items() if key not in given
    }


def test_data_is_described_in_one_line() -> None:
    assert described("test", None) == "test: none"


def test_held_out_prompts_have_the_turns_that_they_were_made_of(
    make_chat_model: Callable[[Path], Path], write_jsonl: Callable[..., str], tmp_path: Path
) -> None:
    turns = [
        [
            {"role": "user", "content": f"{n} the cat"},
            *other,
            {"role": "user", "content": "go on " + "on " * n},
        ]
        for n, other in enumerate(
            [
                [],
                [{"role": "assistant", "content": "sat"}],
                [{"role": "assistant", "content": "on the mat " * 9}],
            ]
        )
    ]
    rows = [{"prompt": prompt, "chosen": "a good day", "rejected": "a bad day"} for prompt in turns]
    model = ModelConfig(name_or_path=str(make_chat_model(tmp_path / "chat")), dtype="float32")
    data = DataConfig(
        train=write_jsonl(rows, "train.jsonl"),
        test=write_jsonl(rows, "test.jsonl"),
        cache_dir=str(tmp_path / "t"),
    )
    _, held_out, tokenizer = open_data(data, model)
    assert held_out is not None
    prompts = held_out_prompts(held_out, 3, completion_tokens=8, positions=40)
    assert max(map(len, prompts)) == 32  # the longest is cut
    asked = asked_prompts(data, prompts, tokenizer)
    assert [list(one.turns or ()) for one in asked] == turns
    assert "0 the cat" in asked[0].text


def test_weights_by_margin_need_scores(
    make_config: Callable[..., Config],
    open_data: Callable[[Config], TokenizedDataset],
    preference_rows: Callable[..., list[dict[str, Any]]],
    write_jsonl: Callable[..., str],
) -> None:
    data = open_data(make_config(write_jsonl(preference_rows(3))))
    loss = replace(LossConfig(), pair_weights="score_margin")
    use = ReferenceUse(
        model=CONFIG.model, options=CONFIG.reference, store=None, datasets=[], sums=[], values=[None]
    )
    with pytest.raises(UserError, match=r"loss\.pair_weights"):
        with_reference(loss, [data], use)


def labels(*values: bool) -> list[dict[str, Any]]:
    return [{"prompt": f"{n} the", "completion": f" {n}", "label": label} for n, label in enumerate(values)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"loss\.type: sigmoid; it needs pairs, and data\.train has 3 labelled completions, 2 of them"),
        (
            {"type": ["bco_pair", "ipo"]},
            r"loss\.type: bco_pair, ipo; .*: use one of nca_pair, apo_zero",
        ),
        ({"type": "bco_pair", "ld_alpha": 0.5}, r"loss\.ld_alpha: 0\.5; it needs pairs"),
        ({"type": "bco_pair", "pair_weights": "wpo"}, r"loss\.pair_weights: wpo; it needs pairs"),
    ],
)
def test_what_compares_pairs_is_refused_for_labels(
    make_config: Callable[..., Config],
    open_data: Callable[[Config], TokenizedDataset],
    write_jsonl: Callable[..., str],
    options: dict[str, Any],
    message: str,
) -> None:
    data = open_data(make_config(write_jsonl(labels(True, False, True))))
    check_labels(LossConfig(type=["kto", "sft"]), data, data)
    with pytest.raises(UserError, match=message):
        check_labels(LossConfig(**options), data, None)


@pytest.mark.parametrize("label", [True, False])
def test_labels_that_are_all_the_same_are_refused(
    make_config: Callable[..., Config],
    open_data: Callable[[Config], TokenizedDataset],
    write_jsonl: Callable[..., str],
    label: bool,
) -> None:
    data = open_data(make_config(write_jsonl(labels(label, label))))
    with pytest.raises(UserError, match=rf"data\.test: all 2 labels are {str(label).lower()}; expected"):
        check_labels(LossConfig(type="kto"), data_of_pairs(open_data, make_config, write_jsonl), data)
    if not label:
        with pytest.raises(UserError, match="2 of 2 prompts have completions with the label false alone"):
            refuse_undesirable(data)
    else:
        refuse_undesirable(data)


def data_of_pairs(
    open_data: Callable[[Config], TokenizedDataset],
    make_config: Callable[..., Config],
    write_jsonl: Callable[..., str],
) -> TokenizedDataset:
    rows = [{"prompt": f"{n} the", "chosen": " a", "rejected": " b"} for n in range(3)]
    return open_data(make_config(write_jsonl(rows, "pairs.jsonl")))


def test_kto_opens_data_with_completions_of_other_prompts(
    make_config: Callable[..., Config], write_jsonl: Callable[..., str]
) -> None:
    config = make_config(write_jsonl(labels(True, False, True)))
    for name, number in (("kto", 2), ("bco_pair", 1)):
        data, _, _ = open_data(config.data, config.model, LossConfig(type=name))
        assert data.sequences_per_group.tolist() == [number] * 3


def test_few_pairs_and_uneven_labels_are_warned_of(
    make_config: Callable[..., Config],
    open_data: Callable[[Config], TokenizedDataset],
    write_jsonl: Callable[..., str],
) -> None:
    data = open_data(make_config(write_jsonl(labels(*[True] * 9, False))))
    few, uneven = cautions(LossConfig(type="kto"), 8, data)
    assert few.startswith("train.pairs_per_step: 8; kto compares the pairs of a step")
    assert "1 x 9 desirable completions is 9.00 times 1 x 1 undesirable ones" in uneven
    assert cautions(LossConfig(type="kto", undesirable_weight=9), 64, data) == []
    assert cautions(LossConfig(type="bco_pair"), 8, data) == []
    assert len(cautions(LossConfig(type="aot"), 8, data)) == 1
