"""reward:MODEL: a reward model that is trained here ranks new answers; its cache, identity and refusals."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from reward import TEMPLATE, train_reward_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GPT2ForSequenceClassification

from dpo.data.records import Message
from dpo.errors import UserError
from dpo.evaluate.asked import Asked
from dpo.evaluate.reward_model import BATCH, RewardScorer
from dpo.evaluate.scoring import load_scorer

ENDS = (" today", " at home", " on the mat", " we like")
PAIRS = [(f"the film {n}", f" ended well{end}", f" ended badly{end}") for n in range(4) for end in ENDS]
PROMPTS = [Asked(f"the cat {n}") for n in range(6)]
GOOD, BAD = ([f" the day ended {how} {n}" for n in range(6)] for how in ("well", "badly"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return train_reward_model(tmp_path_factory.mktemp("reward"), tiny_model, PAIRS, steps=40)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # for cache/scores


def copy_of(model: Path, folder: Path) -> Path:
    shutil.copytree(model, folder)
    return folder


def test_it_ranks_answers_it_has_not_seen(model: Path) -> None:
    scorer = load_scorer(f"reward:{model}")
    good, bad = scorer.score(PROMPTS, GOOD), scorer.score(PROMPTS, BAD)
    assert all(better > worse for better, worse in zip(good, bad, strict=True))
    assert scorer.is_positive(0.1)
    assert not scorer.is_positive(-0.1)


def test_scores_are_the_models_own_on_the_templates_text_in_any_batch(model: Path) -> None:
    dialogue = (Message(role="user", content="hi"), Message(role="assistant", content="yes"))
    chat = Asked("hi\nyes\ngo on", (*dialogue, Message(role="user", content="go on")))
    begun = Asked("the film ended", (Message(role="user", content="the film"), dialogue[1]))
    prompts = [*PROMPTS, chat, begun, *PROMPTS]
    answers = [*GOOD, " a good day", " ended well", *[text + "!" * n for n, text in enumerate(BAD)]]
    assert len(answers) > BATCH
    found = load_scorer(f"reward:{model}").score(prompts, answers)
    written = [
        f"<user>{prompt.text}<assistant>{answer}" for prompt, answer in zip(prompts, answers, strict=True)
    ]
    written[6] = "<user>hi<assistant>yes<user>go on<assistant> a good day"
    written[7] = "<user>the film<assistant>yes ended well"
    plain = GPT2ForSequenceClassification.from_pretrained(model).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    with torch.no_grad():
        expected = [float(plain(**tokenizer(text, return_tensors="pt")).logits) for text in written]
    assert found == pytest.approx(expected, abs=1e-5)


def test_what_is_scored_is_kept_by_content_and_model(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = RewardScorer(str(model))
    first = scorer.score(PROMPTS, GOOD)
    assert scorer.identity is not None
    files = list(Path("cache/scores", scorer.identity[:16]).glob("*.json"))
    assert len(files) == 1
    again = RewardScorer(str(copy_of(model, tmp_path / "elsewhere")))  # a path is not an identity
    monkeypatch.setattr(again, "_pass", lambda texts: pytest.fail("computed again"))
    assert again.score(PROMPTS[::-1], GOOD[::-1]) == first[::-1]
    other = copy_of(model, tmp_path / "other")
    weights = AutoModelForSequenceClassification.from_pretrained(other)
    with torch.no_grad():
        weights.score.weight.mul_(2)
    weights.save_pretrained(other)
    assert RewardScorer(str(other)).score(PROMPTS, GOOD) != first
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE.replace("<", "[")
    tokenizer.save_pretrained(copy_of(model, tmp_path / "template"))
    assert RewardScorer(str(tmp_path / "template")).identity != scorer.identity


def test_a_batch_with_new_answers_keeps_the_scores_that_are_there(model: Path) -> None:
    scorer = RewardScorer(str(model))
    first = scorer.score(PROMPTS[:3], GOOD[:3])
    both = scorer.score(PROMPTS, [*GOOD[:3], *BAD[3:]])
    assert both[:3] == first
    assert RewardScorer(str(model)).score(PROMPTS, [*GOOD[:3], *BAD[3:]]) == both


def test_a_damaged_file_of_scores_is_named(model: Path) -> None:
    scorer = RewardScorer(str(model))
    scorer.score(PROMPTS, GOOD)
    (file,) = Path("cache/scores").rglob("*.json")
    file.write_text(json.dumps([1]))
    with pytest.raises(UserError, match=r"not a file of scores .*; delete it"):
        RewardScorer(str(model))


def test_without_a_chat_template_it_is_refused_unless_told(model: Path, tmp_path: Path) -> None:
    folder = copy_of(model, tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"has no chat template.*or reward-plain:MODEL"):
        load_scorer(f"reward:{folder}")
    found = load_scorer(f"reward-plain:{folder}").score(PROMPTS[:1], GOOD[:1])
    plain, tokenizer = (
        GPT2ForSequenceClassification.from_pretrained(model).eval(),
        AutoTokenizer.from_pretrained(model),
    )
    with torch.no_grad():
        expected = float(plain(**tokenizer(PROMPTS[0].text + GOOD[0], return_tensors="pt")).logits)
    assert found == pytest.approx([expected], abs=1e-5)


def test_what_is_no_reward_model_is_refused(model: Path, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot load .*nowhere"):
        load_scorer(f"reward:{tmp_path}/nowhere")
    with pytest.raises(UserError, match=r"not a reward model: it lacks score\.weight"):
        load_scorer(f"reward:{tiny_model}")
    two = copy_of(model, tmp_path / "two")
    GPT2ForSequenceClassification.from_pretrained(
        model, num_labels=2, ignore_mismatched_sizes=True
    ).save_pretrained(two)
    with pytest.raises(UserError, match=r"it has 2 outputs; expected .* or use hf:MODEL"):
        load_scorer(f"reward:{two}")


def test_a_dialogue_that_the_template_refuses_and_one_that_is_too_long(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of(model, tmp_path / "strict")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    scorer = load_scorer(f"reward:{folder}")
    system = Asked("be good", (Message(role="system", content="be good"),))
    with pytest.raises(UserError, match=r"refuses these turns: no system; the prompt begins 'be good'"):
        scorer.score([system], ["x"])
    scorer.score([Asked("a " * 100)] * 2, [" day", " film"])
    assert capsys.readouterr().out.count("the start of longer ones is left out") == 1
