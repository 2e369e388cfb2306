"""What several commands open: defaults of the configuration, and data in one line."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from dpo.commands.inputs import described, settings_of, with_reference
from dpo.config import Config, DataConfig, LossConfig, ModelConfig, SftConfig, SftModelConfig, flat, resolved
from dpo.data.dataset import TokenizedDataset
from dpo.errors import UserError
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
