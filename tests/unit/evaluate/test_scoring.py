"""Scorers: which texts are positive, which class of a classifier counts as positive, what is refused."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from dpo.config import EvaluateConfig
from dpo.errors import UserError
from dpo.evaluate.asked import Asked
from dpo.evaluate.scoring import CLASSIFIER_BATCH, Scorer, check_scorer, load_scorer, score_over_ranks

WORDS = ["<s>", "<pad>", "</s>", "<unk>", "good", "bad", "film", "a"]


def scores_of(scorer: Scorer, texts: list[str]) -> list[float]:
    return scorer.score([Asked("a prompt")] * len(texts), texts)


def save_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def save_classifier(folder: Path, labels: list[str]) -> RobertaForSequenceClassification:
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=18,
        initializer_range=0.5,
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
    )
    model = RobertaForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


def test_vader_scores_are_compounds_and_positive_above_a_twentieth() -> None:
    scorer = load_scorer("vader")
    happy, sad, neutral = scores_of(
        scorer, ["What a wonderful day!", "This is horrible.", "The table is brown."]
    )
    assert -1 <= sad < -0.05 < neutral == 0 < 0.05 < happy <= 1
    assert scorer.is_positive(0.051)
    assert not scorer.is_positive(0.05)


def test_a_classifier_gives_the_probability_of_its_positive_class(tmp_path: Path) -> None:
    model = save_classifier(tmp_path, ["POSITIVE", "NEGATIVE"])
    ids = torch.tensor([[WORDS.index("good"), WORDS.index("film")]])
    expected = model(ids).logits.softmax(-1)[0, 0].item()
    scorer = load_scorer(f"hf:{tmp_path}")
    assert scorer.name == f"hf:{tmp_path}"
    # with padding: the other text is longer
    assert scores_of(scorer, ["good film", "a bad film a bad film"])[0] == pytest.approx(expected, abs=1e-6)
    assert scorer.is_positive(0.501)
    assert not scorer.is_positive(0.5)


def test_the_positive_class_is_found_by_name_at_any_position(tmp_path: Path) -> None:
    texts = ["good", "bad film", "a good film"]
    model = save_classifier(tmp_path / "three", ["neg", "neutral", "Pos"])
    ids = torch.tensor([[WORDS.index("good")]])
    expected = model(ids).logits.softmax(-1)[0, 2].item()
    assert scores_of(load_scorer(f"hf:{tmp_path / 'three'}"), texts)[0] == pytest.approx(expected, abs=1e-6)
    save_classifier(tmp_path / "named", ["negative", "positive"])
    save_classifier(tmp_path / "numbered", ["LABEL_0", "LABEL_1"])
    named = scores_of(load_scorer(f"hf:{tmp_path / 'named'}"), texts)
    assert scores_of(load_scorer(f"hf:{tmp_path / 'numbered'}"), texts) == named


@pytest.mark.parametrize("labels", [["joy", "grief"], ["LABEL_0", "LABEL_1", "LABEL_2"], ["pos", "positive"]])
def test_labels_without_a_single_positive_class_are_listed(tmp_path: Path, labels: list[str]) -> None:
    save_classifier(tmp_path, labels)
    with pytest.raises(UserError, match=", ".join(labels)):
        load_scorer(f"hf:{tmp_path}")


def test_only_the_start_of_a_text_that_is_too_long_is_scored(tmp_path: Path) -> None:
    save_classifier(tmp_path, ["negative", "positive"])
    start = " ".join(["good"] * 16)
    cut, whole = scores_of(load_scorer(f"hf:{tmp_path}"), [start + " bad" * 50, start])
    assert cut == pytest.approx(whole, abs=1e-6)


def test_a_language_model_is_not_a_classifier(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=len(WORDS), n_positions=16, n_embd=32, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"score\.weight"):
        load_scorer(f"hf:{tmp_path}")


def test_missing_models_pickled_weights_and_unknown_names_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        load_scorer(f"hf:{tmp_path}/nowhere")
    save_classifier(tmp_path, ["negative", "positive"])
    weights = tmp_path / "model.safetensors"
    weights.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=str(tmp_path)):
        load_scorer(f"hf:{tmp_path}")
    for name in ("happy", "hf:", ""):
        with pytest.raises(UserError, match="hf:MODEL"):
            load_scorer(name)


def checked(scorer: str | None, num_prompts: int = 4) -> None:
    check_scorer(EvaluateConfig(scorer=scorer, num_prompts=num_prompts))


def test_a_wrong_scorer_is_known_before_its_weights_are_loaded(tmp_path: Path, tiny_model: Path) -> None:
    for name, labels in (("right", ["negative", "positive"]), ("wrong", ["joy", "grief"])):
        save_classifier(tmp_path / name, labels)
        (tmp_path / name / "model.safetensors").unlink()
    checked(f"hf:{tmp_path / 'right'}")
    checked("vader")
    checked(None)
    for scorer, said in (
        (f"hf:{tmp_path / 'wrong'}", "joy, grief"),
        (f"hf:{tmp_path / 'nowhere'}", "cannot load"),
        (f"reward:{tmp_path / 'nowhere'}", "cannot load"),
        (f"reward:{tiny_model}", "it has 2 outputs"),
        (f"reward-plain:{tiny_model}", "it has 2 outputs"),
        ("python:no_such_module.words", "No module named"),
        ("command:./no_such_program", "no such program"),
    ):
        with pytest.raises(UserError, match=said):
            checked(scorer)
        checked(scorer, num_prompts=0)  # nothing is scored


def test_all_texts_are_scored_in_order() -> None:
    texts = ["wonderful" if number % 3 == 0 else "horrible" for number in range(2 * CLASSIFIER_BATCH + 5)]
    scores = score_over_ranks(load_scorer("vader"), [*map(Asked, texts)], texts)
    assert [score > 0 for score in scores] == [text == "wonderful" for text in texts]
