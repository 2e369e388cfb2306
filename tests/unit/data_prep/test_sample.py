"""The source `sample` through its command, with a tiny random policy: files, splits, counts and errors."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from data_prep.cli import main
from data_prep.files import PreferenceWriter
from dpo.data.records import Message, Pair, PreferenceGroup

WORDS = ("good", "bad", "happy", "sad", "awful", "lovely", "table", "chair", "love", "hate", "wonderful")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([f" {word}" for word in WORDS] * 50, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=48,
        n_embd=32,
        n_layer=2,
        n_head=2,
        eos_token_id=0,
        bos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():  # whole words and EOS only: vader gives random bytes no score
        words = [tokenizer(f" {word}").input_ids for word in WORDS]
        assert all(len(ids) == 1 for ids in words)
        model.transformer.wte.weight.mul_(0)
        model.transformer.wte.weight[[0, *(ids[0] for ids in words)], 0] = 1.0
        model.transformer.ln_f.bias[0] = 20.0
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("\n".join(f"{number} good bad table chair sad happy" for number in range(60)))
    return file


def run(policy: Path, source: Path, output: Path, *options: str) -> int:
    defaults = "--scorer vader --dtype float32 --num_samples 4 --completion_tokens 3 --prompt_tokens 6"
    return main(
        ["sample", str(source), "--model", str(policy), "--output", str(output), *defaults.split(), *options]
    )


def rows(folder: Path, split: str) -> list[dict[str, Any]]:
    return list(pq.read_table(folder / f"{split}.parquet").to_pylist())


def test_prompts_of_a_text_become_scored_groups(
    policy: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert run(policy, text, output, "--num_prompts", "12", "--num_test_prompts", "4") == 0
    manifest = json.loads((output / "manifest.json").read_text())
    train, test = rows(output, "train"), rows(output, "test")
    dropped = sum(manifest["dropped"].values())
    assert len(train) + len(test) + dropped == 16
    assert 8 <= len(train) <= 12
    assert len(test) <= 4
    assert manifest["completions_are_complete"] is False
    assert manifest["sources"][0]["name"] == "text.txt"
    for row in train + test:
        assert row["prompt"] in text.read_text()
        assert len(set(row["completions"])) == len(row["completions"]) == len(row["scores"])
        best = max(row["scores"])
        for pair in row["pairs"]:
            assert row["scores"][pair["chosen"]] == best > row["scores"][pair["rejected"]]
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    printed = capsys.readouterr().out
    assert "sampled 64 continuations of 16 prompts: mean score" in printed
    assert "% positive (vader)" in printed
    assert f"{len(train)} train and {len(test)} test groups" in printed


def test_the_seed_decides_the_samples_and_the_batch_size_does_not(
    policy: Path, text: Path, tmp_path: Path
) -> None:
    few = ("--num_prompts", "8", "--num_test_prompts", "0")
    for name, options in {
        "a": (),
        "b": ("--batch_size", "3"),
        "c": ("--seed", "1"),
    }.items():
        assert run(policy, text, tmp_path / name, *few, *options) == 0
    a, b, c = (rows(tmp_path / name, "train") for name in "abc")
    assert a == b
    assert [row["completions"] for row in a] != [row["completions"] for row in c]


def test_ready_prompts_keep_their_text_and_their_split(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "ready"
    prompts = {"train": ["a table", "a chair", "too long " * 20, "a table"], "test": ["a held out chair"]}
    with PreferenceWriter(source, overwrite=False, completions_are_complete=True, source={}) as writer:
        for split, texts in prompts.items():
            for prompt in texts:
                group = PreferenceGroup(prompt=prompt, completions=(" x", " y"), pairs=(Pair(0, 1),))
                writer.write("train" if split == "train" else "test", group)
    output = tmp_path / "out"
    assert run(policy, source, output, "--num_samples", "16") == 0
    assert "sampled 48 continuations of 3 prompts" in capsys.readouterr().out
    assert {row["prompt"] for row in rows(output, "train")} == {"a table", "a chair"}
    assert {row["prompt"] for row in rows(output, "test")} == {"a held out chair"}
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["dropped"] == {"prompt_too_long": 1}
    assert [file["name"] for file in manifest["sources"]] == ["test.parquet", "train.parquet"]


def test_a_prompt_that_the_chat_template_refuses_is_dropped_and_counted(policy: Path, tmp_path: Path) -> None:
    chatty = tmp_path / "chatty"
    shutil.copytree(policy, chatty)
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        "{% for m in messages %} {{ m.content }}{% endfor %}"
    )
    tokenizer.save_pretrained(chatty)
    source = tmp_path / "chats"
    with PreferenceWriter(source, overwrite=False, completions_are_complete=True, source={}) as writer:
        for role in ("user", "system"):
            prompt = (Message(role=role, content=f"{role} table"),)
            writer.write("train", PreferenceGroup(prompt=prompt, completions=("x", "y"), pairs=(Pair(0, 1),)))
    assert run(chatty, source, tmp_path / "out", "--num_samples", "16") == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["dropped"] == {"template_refuses_dialogue": 1}
    assert [row["prompt"][0]["role"] for row in rows(tmp_path / "out", "train")] == ["user"]


def test_parts_of_the_prompts_are_disjoint_and_held_out_ones_are_in_each(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ready = tmp_path / "ready.jsonl"
    ready.write_text(
        "".join(
            json.dumps({"prompt": f"table {n}", "chosen": " good", "rejected": " bad"}) + "\n"
            for n in range(30)
        )
    )
    folder = tmp_path / "folder"
    assert main(["preferences", str(ready), "--output", str(folder)]) == 0
    prompts: list[set[str]] = []
    for part in range(1, 4):
        output = tmp_path / f"part_{part}"
        assert run(policy, folder, output, "--part", f"{part}/3") == 0
        prompts.append({row["prompt"] for row in rows(output, "train")})
        held_out = {row["prompt"] for row in rows(output, "test")}
        assert held_out <= {row["prompt"] for row in rows(folder, "test")}
    assert sum(map(len, prompts)) == len(set.union(*prompts)) > 10
    assert run(policy, folder, tmp_path / "none", "--part", "1/1000") == 2
    assert "1000 parts of 27 training prompts; each part, a round" in capsys.readouterr().err


def test_held_out_prompts_are_those_of_another_round_and_need_not_be_sampled(
    policy: Path, text: Path, tmp_path: Path
) -> None:
    options = ("--num_prompts", "20", "--num_test_prompts", "8")
    for name, more in {"first": ("--part", "1/2"), "second": ("--part", "2/2", "--train_only")}.items():
        assert run(policy, text, tmp_path / name, *options, *more) == 0
    first, second, held_out = (
        {row["prompt"] for row in rows(tmp_path / name, split)}
        for name, split in (("first", "train"), ("second", "train"), ("first", "test"))
    )
    assert min(map(len, (first, second, held_out))) > 5
    assert not first & second
    assert not (first | second) & held_out
    assert not (tmp_path / "second" / "test.parquet").exists()


def test_a_source_whose_prompts_are_all_held_out_is_one_message(
    policy: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(policy, text, tmp_path / "made", "--num_prompts", "8", "--num_test_prompts", "4") == 0
    none = pq.read_table(tmp_path / "made" / "train.parquet").slice(0, 0)
    pq.write_table(none, tmp_path / "made" / "train.parquet")
    assert run(policy, tmp_path / "made", tmp_path / "out") == 2
    assert "no training groups" in capsys.readouterr().err


def test_only_what_the_model_finished_is_complete(policy: Path, text: Path, tmp_path: Path) -> None:
    assert run(policy, text, tmp_path / "all", "--num_prompts", "10", "--num_test_prompts", "10") == 0
    cut = run(
        policy, text, tmp_path / "cut", "--num_prompts", "10", "--num_test_prompts", "10", "--only_finished"
    )
    assert cut == 0
    complete = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("all", "cut")]
    assert [manifest["completions_are_complete"] for manifest in complete] == [False, True]
    kept = [text for row in rows(tmp_path / "cut", "train") for text in row["completions"]]
    assert kept
    assert all(len(text.split()) < 3 for text in kept)  # the third token is EOS


def test_a_weaker_models_continuations_are_rejected_with_and_without_a_scorer(
    policy: Path, text: Path, tmp_path: Path
) -> None:
    weaker = tmp_path / "weaker"
    shutil.copytree(policy, weaker)
    model = GPT2LMHeadModel.from_pretrained(weaker)
    tokenizer = AutoTokenizer.from_pretrained(weaker)
    with torch.no_grad():  # it says one word alone
        model.transformer.wte.weight[tokenizer(" awful").input_ids[0], 0] = 30.0
    model.save_pretrained(weaker)
    options = ["--rejected_model", str(weaker), "--num_prompts", "8", "--num_test_prompts", "2"]
    assert run(policy, text, tmp_path / "scored", *options) == 0
    defaults = [
        "--dtype",
        "float32",
        "--num_samples",
        "1",
        "--completion_tokens",
        "3",
        "--prompt_tokens",
        "6",
    ]
    plain = ["--model", str(policy), "--output", str(tmp_path / "plain"), *defaults, *options]
    assert main(["sample", str(text), *plain]) == 0
    for name, scored in (("scored", True), ("plain", False)):
        kept = rows(tmp_path / name, "train")
        assert len(kept) >= 6
        for row in kept:
            for pair in row["pairs"]:
                assert row["completions"][pair["rejected"]] == " awful awful awful"
                assert row["completions"][pair["chosen"]] != " awful awful awful"
            assert (row["scores"] is not None) is scored
    assert all(len(row["pairs"]) == 1 for row in rows(tmp_path / "plain", "train"))


def test_lengths_can_be_balanced(policy: Path, text: Path, tmp_path: Path) -> None:
    few = ("--num_prompts", "40", "--num_test_prompts", "0", "--pairing", "best-vs-worst")
    assert run(policy, text, tmp_path / "out", *few, "--balance_lengths") == 0
    longer = [
        len(row["completions"][pair["chosen"]]) - len(row["completions"][pair["rejected"]])
        for row in rows(tmp_path / "out", "train")
        for pair in row["pairs"]
    ]
    assert len(longer) >= 4
    assert sum(difference > 0 for difference in longer) == sum(difference < 0 for difference in longer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--num_samples", "1"), "--num_samples: 1; expected at least 2"),
        (("--rejected_model", "/nowhere"), "--rejected_model: /nowhere does not exist"),
        (
            ("--rejected_model", "x", "--pairing", "all"),
            "--pairing: all; with --rejected_model the models decide",
        ),
        (
            ("--rejected_model", "x", "--sampler", "endpoint"),
            "--rejected_model: the server of --endpoint has one",
        ),
        (("--temperature", "0"), "--temperature: 0.0; expected at least 0.01"),
        (("--scorer", "nothing"), "scorer: nothing; expected vader, hf:MODEL, reward:MODEL, python:module"),
        (("--model", "/nowhere"), "--model: /nowhere does not exist"),
        (("--num_prompts", "1000"), "--num_prompts"),
        (("--num_prompts", "4", "--completion_tokens", "43"), "43 tokens"),
    ],
)
def test_bad_usage_is_one_message_and_status_2(
    policy: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    message: str,
) -> None:
    assert run(policy, text, tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
