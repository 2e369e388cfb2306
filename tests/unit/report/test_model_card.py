"""Model cards: the front matter for the hub, and the sections."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo.config import (
    DataConfig,
    DataSource,
    LoraConfig,
    LossConfig,
    ModelConfig,
    ReferenceConfig,
    SftModelConfig,
    SftTrainConfig,
    TrainConfig,
)
from dpo.report.content import Ran
from dpo.report.model_card import policy_card, sft_card

RESULTS = {
    "eval/rewards/accuracies": 0.75,
    "eval/rewards/accuracies/low": 0.7,
    "eval/rewards/accuracies/high": 0.8,
    "distinct_2/policy": 0.4,
}


def card_of(
    results: dict[str, float],
    *,
    base: str = "gpt2",
    train: Any = "Anthropic/hh-rlhf",
    loss: str = "sigmoid",
    **model: Any,
) -> str:
    return policy_card(
        results,
        title="mine",
        model=ModelConfig(name_or_path=base, **model),
        data=DataConfig(train=train),
        reference=ReferenceConfig(),
        loss=LossConfig(type=loss),
        train=TrainConfig(),
        ran=Ran(steps=7, warmup=2, train="40 pairs of 20 prompts", held_out="3 pairs of 3 prompts"),
    )


def sft_card_of(base: str) -> str:
    return sft_card(
        {},
        title="mine",
        model=SftModelConfig(name_or_path=base),
        data=DataConfig(train="books.txt"),
        train=SftTrainConfig(),
        ran=Ran(steps=9, warmup=0, train="40 sequences", held_out=""),
    )


def metadata(card: str) -> dict[str, Any]:
    block: dict[str, Any] = yaml.safe_load(card.split("---")[1])
    return block


def test_the_metadata_name_base_data_and_results() -> None:
    card = card_of(RESULTS)
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
    assert "| held-out reward accuracy | 0.750 | 0.700 to 0.800 |  |" in card


def test_a_card_says_what_was_run() -> None:
    card = card_of(RESULTS | {"eval/num_pairs": 3.0})
    assert "| learning rate | 1e-06, constant, after 2 warm-up steps |" in card
    assert "| length | 7 optimizer steps, 1 epoch(s) at most |" in card
    assert "| training data | 40 pairs of 20 prompts |" in card
    assert "| held-out data | 3 pairs of 3 prompts |" in card
    assert "| 0.700 to 0.800 | 3 pairs |" in card
    assert "held-out data" not in sft_card_of("gpt2")


@pytest.mark.parametrize("heading", ["Results", "Training", "Intended use", "How to load it"])
def test_a_card_has_its_sections(heading: str) -> None:
    assert f"\n## {heading}\n" in card_of(RESULTS)


def test_local_models_and_data_are_not_named_as_hub_names(tmp_path: Path) -> None:
    for path in ("runs/sft/model", "/home/me/model", str(tmp_path)):
        assert "base_model" not in metadata(card_of({}, base=path))
    mixture = [DataSource(path="/data/mine.jsonl"), DataSource(path="org/data")]
    assert metadata(card_of({}, train=mixture))["datasets"] == ["org/data"]


def test_without_results_there_is_no_section_of_results() -> None:
    card = card_of({})
    assert "model-index" not in metadata(card)
    assert "## Results" not in card


@pytest.mark.parametrize(("export", "library"), [("merged", "transformers"), ("adapter", "peft")])
def test_a_card_of_an_adapter_names_peft(export: Any, library: str) -> None:
    card = card_of({}, lora=LoraConfig(rank=8, export=export))
    assert metadata(card)["library_name"] == library
    assert "lora" in metadata(card)["tags"]
    assert "rank 8, alpha 32" in card
    assert ("AutoPeftModelForCausalLM.from_pretrained" in card) == (export == "adapter")


def test_the_card_of_next_token_training_names_its_start_and_data() -> None:
    assert "from `gpt2` on `books.txt`" in sft_card_of("gpt2")
    assert "from random weights on `books.txt`" in sft_card_of("")


def test_a_loss_without_a_reference_names_none() -> None:
    assert "with reference `gpt2`" in card_of({})
    assert "with reference" not in card_of({}, loss="simpo")
