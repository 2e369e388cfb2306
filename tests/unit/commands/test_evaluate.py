"""One evaluation on a tiny model: what it writes, for equal models and for different ones."""

import json
import re
import shutil
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_server import FakeServer, serving
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from dpo.commands import evaluate
from dpo.commands.evaluate import evaluate_run
from dpo.config import Config, EvaluateConfig, ModelConfig
from dpo.data.dataset import TokenizedDataset
from dpo.data.preference_data import preference_data
from dpo.engine import frozen
from dpo.errors import UserError
from dpo.evaluate import samples
from dpo.model.load import load_model
from dpo.reference.identity import reference_identity
from dpo.reference.precompute import precompute
from dpo.reference.store import ReferenceStore
from dpo.reference.values import reference_logps


@pytest.fixture
def experiment(
    make_config: Callable[..., Config],
    write_jsonl: Callable[..., str],
    preference_rows: Callable[..., list[dict[str, Any]]],
) -> Config:
    config = make_config(write_jsonl(preference_rows(8)))
    options = EvaluateConfig(num_prompts=6, completion_tokens=8, scorer="vader", batch_size=4, table_rows=2)
    return replace(config, evaluate=options)


@pytest.fixture
def other_model(tiny_model: Path, tmp_path: Path) -> ModelConfig:
    """The tiny model with its output sharpened: another policy."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    weights = load_file(folder / "model.safetensors")
    weights["transformer.ln_f.weight"] *= 1.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return ModelConfig(name_or_path=str(folder), dtype="float32")


@pytest.fixture
def summarize(
    open_data: Callable[[Config], TokenizedDataset], tokenizer: PreTrainedTokenizerFast
) -> Callable[[Config, ModelConfig], dict[str, float]]:
    def run(config: Config, policy: ModelConfig) -> dict[str, float]:
        data, root = open_data(config), Path(config.reference.cache_dir)
        store = ReferenceStore(root, reference_identity(config.model, root))
        precompute(config.model, config.reference, [data], store)
        logps = reference_logps([data], store, "")[0]
        evaluate_run(
            config,
            policy,
            config.model,
            preference_data(data, logps),
            tokenizer,
            {"reference cache": "identity 1234"},
        )
        summary: dict[str, float] = json.loads(Path(config.run_dir, "report", "summary.json").read_text())
        return summary

    return run


Summarize = Callable[[Config, ModelConfig], dict[str, float]]


def test_a_policy_equal_to_the_reference_has_no_kl_and_no_margin(
    experiment: Config, summarize: Summarize, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = summarize(experiment, experiment.model)
    assert summary["eval/loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert summary["eval/rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert (summary["kl/sequence"], summary["kl/token"]) == (0.0, 0.0)
    assert summary["win_rate"] == 0.5  # every comparison is a tie
    for name in ("score", "positive_share", "distinct_2"):
        assert summary[f"{name}/policy"] == summary[f"{name}/reference"]
    printed = capsys.readouterr().out
    assert "report/report.html" in printed
    assert "held-out loss 0.6931" in printed


def test_the_summary_is_flat_and_has_the_documented_names_and_intervals(
    experiment: Config, summarize: Summarize
) -> None:
    summary = summarize(experiment, experiment.model)
    pairs = ("eval/loss", "eval/rewards/accuracies", "eval/rewards/margins")
    sampled = ("score/reference", "score/policy", "positive_share/reference", "positive_share/policy")
    kl = ("win_rate", "kl/sequence", "kl/token")
    assert summary.keys() >= {*pairs, *sampled, *kl, "distinct_2/reference", "distinct_2/policy"}
    for name in (*pairs, *sampled, *kl):
        assert summary[f"{name}/low"] <= summary[name] <= summary[f"{name}/high"]
    assert all(isinstance(value, int | float) for value in summary.values())


def test_a_judge_compares_the_samples_and_both_are_kept_for_other_judges(
    experiment: Config, summarize: Summarize, other_model: ModelConfig
) -> None:
    def longer(body: Mapping[str, Any]) -> Any:
        first, second = re.findall(r"<(.*?)>", body["messages"][0]["content"], re.DOTALL)
        letter = "C" if len(first) == len(second) else "A" if len(first) > len(second) else "B"
        return {"choices": [{"message": {"content": f"I say [[{letter}]]"}}]}

    rubric = Path(experiment.run_dir).parent / "rubric.txt"
    rubric.write_text("{conversation} <{answer_a}> <{answer_b}>")
    with serving(FakeServer(answer=longer, models=["judge"])) as server:
        options = replace(experiment.evaluate, judge=f"judge@{server.url}", judge_rubric=str(rubric))
        summary = summarize(replace(experiment, evaluate=options), other_model)
    report = Path(experiment.run_dir, "report")
    lines = [json.loads(line) for line in (report / "for_judges.jsonl").read_text().splitlines()]
    policy, reference = (
        [line["output"] for line in lines if line["generator"] == name] for name in ("policy", "reference")
    )
    assert len(policy) == len(reference) == 6
    wins = [(np.sign(len(p) - len(r)) + 1) / 2 for p, r in zip(policy, reference, strict=True)]
    assert summary["judge/win_rate"] == pytest.approx(np.mean(wins))
    assert summary["judge/orders_agree"] == 1.0
    assert summary["judge/first_wins"] == 0.5
    assert len((report / "judged.jsonl").read_text().splitlines()) == 6
    assert "win rate by the judge" in (report / "report.md").read_text()


def test_a_different_policy_has_a_kl_and_margins(
    experiment: Config, summarize: Summarize, other_model: ModelConfig
) -> None:
    summary = summarize(experiment, other_model)
    assert summary["kl/sequence"] > 0.1
    assert summary["kl/token"] > 0.01
    assert abs(summary["eval/rewards/margins"]) > 1e-3


def test_one_model_is_in_memory_at_a_time_and_the_policy_comes_first(
    experiment: Config, summarize: Summarize, other_model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[tuple[str, Any]] = []

    def watched(model: ModelConfig) -> Any:
        assert all(reference() is None for _, reference in loaded), "two models in memory"
        made = load_model(model)
        loaded.append((model.name_or_path, weakref.ref(made)))
        return made

    monkeypatch.setattr(frozen, "load_model", watched)
    summarize(experiment, other_model)
    reference = experiment.model.name_or_path  # also loaded to fill the cache
    assert [name for name, _ in loaded] == [reference, other_model.name_or_path, reference]


def test_without_prompts_only_the_pairs_are_scored(
    experiment: Config, summarize: Summarize, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("sampled")

    monkeypatch.setattr(samples, "sample", never)
    config = replace(experiment, evaluate=replace(experiment.evaluate, num_prompts=0))
    summary = summarize(config, config.model)
    assert "eval/loss" in summary
    assert not any(name.startswith(("kl/", "score/", "win_rate")) for name in summary)


def test_without_a_scorer_there_are_samples_but_no_scores(experiment: Config, summarize: Summarize) -> None:
    config = replace(experiment, evaluate=replace(experiment.evaluate, scorer=None))
    summary = summarize(config, config.model)
    assert {"kl/sequence", "distinct_2/policy"} <= summary.keys()
    assert not any(name.startswith(("score/", "positive_share/", "win_rate")) for name in summary)
    lines = Path(config.run_dir, "report", "samples.jsonl").read_text().splitlines()
    assert len(lines) == 6


def test_a_wrong_scorer_ends_before_anything_is_sampled(
    experiment: Config, summarize: Summarize, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = replace(experiment, evaluate=replace(experiment.evaluate, scorer="hf:./nowhere/at/all"))
    monkeypatch.setattr(evaluate, "_use_policy", lambda *_: pytest.fail("the policy was loaded"))
    with pytest.raises(UserError, match=r"scorer hf:\./nowhere/at/all: cannot load"):
        summarize(wrong, experiment.model)
