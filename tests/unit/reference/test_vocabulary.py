"""The reference must read the policy's token ids as the policy does."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from dpo.config import ModelConfig, ReferenceConfig
from dpo.errors import UserError
from dpo.reference.vocabulary import check_vocabulary, differences


@pytest.fixture
def other(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, whose tokenizer a test may change."""
    return Path(shutil.copytree(tiny_model, tmp_path / "other"))


def check(tiny_model: Path, reference: Path | None) -> list[str]:
    name = None if reference is None else str(reference)
    return check_vocabulary(ModelConfig(name_or_path=str(tiny_model)), ReferenceConfig(model=name))


def exchange(folder: Path, first: str, second: str) -> None:
    """Exchanges the ids of two tokens."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(content))


def test_a_reference_with_other_ids_is_refused_with_an_example(tiny_model: Path, other: Path) -> None:
    exchange(other, "a", "b")
    with pytest.raises(UserError, match=r"reference\.model: .*2 tokens differ.*'a' is \d+") as error:
        check(tiny_model, other)
    assert str(other) in str(error.value)


def test_a_token_that_the_other_does_not_have_differs_by_its_id(
    tokenizer: PreTrainedTokenizerFast, other: Path
) -> None:
    path = other / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["zzz"] = content["model"]["vocab"].pop("Ġcat")
    content["model"]["merges"] = [pair for pair in content["model"]["merges"] if "".join(pair) != "Ġcat"]
    path.write_text(json.dumps(content))
    (found,) = differences(tokenizer, PreTrainedTokenizerFast.from_pretrained(other))
    assert "'Ġcat' in the policy and 'zzz' in the reference" in found


def test_another_template_and_further_tokens_are_in_order(tiny_model: Path, other: Path) -> None:
    loaded = PreTrainedTokenizerFast.from_pretrained(other)
    loaded.chat_template = "{{ messages }}"
    loaded.add_tokens(["<new>"])
    loaded.save_pretrained(other)
    assert check(tiny_model, other) == []
    assert check(other, tiny_model) == []


def test_a_reserved_token_may_be_renamed(tiny_model: Path, other: Path, tmp_path: Path) -> None:
    renamed = Path(shutil.copytree(other, tmp_path / "renamed"))
    for folder, name in ((other, "<reserved_0>"), (renamed, "<tool>")):
        loaded = PreTrainedTokenizerFast.from_pretrained(folder)
        loaded.add_special_tokens({"additional_special_tokens": [name]})
        loaded.save_pretrained(folder)
    assert check(other, renamed) == []


def test_no_reference_of_its_own_needs_no_check(tiny_model: Path) -> None:
    assert check(tiny_model, None) == []


def test_a_reference_without_a_tokenizer_is_a_warning(tiny_model: Path, other: Path) -> None:
    for path in other.glob("tokenizer*"):
        path.unlink()
    (line,) = check(tiny_model, other)
    assert f"reference.model: {other}" in line
