"""Model cards: metadata that the hub reads, and what people want to know."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo.config import (
    Config,
    DataConfig,
    DataSource,
    LoraConfig,
    ModelConfig,
    SftConfig,
    SftModelConfig,
)
from dpo.report.model_card import policy_card, sft_card

RESULTS = {
    "eval/rewards/accuracies": 0.75,
    "eval/rewards/accuracies/low": 0.7,
    "eval/rewards/accuracies/high": 0.8,
    "distinct_2/policy": 0.4,
}


def config(base: str = "gpt2", train: Any = "Anthropic/hh-rlhf", **model: Any) -> Config:
    return Config(
        run_dir="runs/mine",
        model=ModelConfig(name_or_path=base, **model),
        data=DataConfig(train=train),
    )


def metadata(card: str) -> dict[str, Any]:
    block: dict[str, Any] = yaml.safe_load(card.split("---")[1])
    return block


def test_the_metadata_name_base_data_and_results() -> None:
    card = policy_card(config(), RESULTS)
    block = metadata(card)
    assert block["base_model"] == "gpt2"
    assert block["datasets"] == ["Anthropic/hh-rlhf"]
    assert block["library_name"] == "transformers"
    assert "dpo" in block["tags"]
    (model,) = block["model-index"]
    (result,) = model["results"]
    assert result["metrics"] == [
        {"type": "eval/rewards/accuracies", "name": "held-out reward accuracy", "value": 0.75}
    ]
    assert "| held-out reward accuracy | 0.750 | 0.700 to 0.800 |" in card


@pytest.mark.parametrize("heading", ["Results", "Training", "Intended use", "How to load it"])
def test_a_card_has_its_sections(heading: str) -> None:
    assert f"\n## {heading}\n" in policy_card(config(), RESULTS)


def test_what_is_on_this_disk_is_not_claimed_to_be_on_the_hub(tmp_path: Path) -> None:
    for path in ("runs/sft/model", "/home/me/model", str(tmp_path)):
        assert "base_model" not in metadata(policy_card(config(base=path), {}))
    mixture = [DataSource(path="/data/mine.jsonl"), DataSource(path="org/data")]
    assert metadata(policy_card(config(train=mixture), {}))["datasets"] == ["org/data"]


def test_without_results_none_are_claimed() -> None:
    card = policy_card(config(), {})
    assert "model-index" not in metadata(card)
    assert "## Results" not in card


@pytest.mark.parametrize(("export", "library"), [("merged", "transformers"), ("adapter", "peft")])
def test_a_card_says_what_an_adapter_needs(export: Any, library: str) -> None:
    card = policy_card(config(lora=LoraConfig(rank=8, export=export)), {})
    assert metadata(card)["library_name"] == library
    assert "lora" in metadata(card)["tags"]
    assert "rank 8, alpha 32" in card
    assert ("PeftModel.from_pretrained" in card) == (export == "adapter")


def test_the_card_of_next_token_training_says_what_it_started_from() -> None:
    started = SftConfig(model=SftModelConfig(name_or_path="gpt2"), data=DataConfig(train="books.txt"))
    assert "from `gpt2` on `books.txt`" in sft_card(started, {})
    assert "from random weights" in sft_card(SftConfig(data=DataConfig(train="books.txt")), {})
