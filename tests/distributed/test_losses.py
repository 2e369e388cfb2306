"""Law 4 for every loss, all from one cache: results do not depend on the number of ranks or micro-batches."""

import json
import math
from pathlib import Path

import pytest
from loss_ranks import BUDGETS, STEPS, SWEEP, sweep, write_experts, write_scored
from ranks import free_port, rank_environment, start_rank, wait
from rig import Rig, make_rig

Steps = list[dict[str, float]]
Both = tuple[dict[str, Steps], dict[str, Steps]]

OF_EXPERTS = ("router/aux_loss", "router/max_load", "router/unused_experts")
COMPARED = ("loss", "grad_norm", "rewards/margins", "rewards/chosen", "logps/chosen", "num_tokens")


def measured(folder: Path, model: Path, world_size: int) -> dict[str, Steps]:
    """Maps loss and budget to the metrics of each step, measured on real ranks."""
    out, port = folder / f"ranks{world_size}.json", free_port()
    processes = []
    for rank in range(world_size):
        environment = rank_environment(rank, world_size, port) if world_size > 1 else {}
        processes.append(start_rank(sweep, environment, folder, model, out))
    assert wait(processes, 240) == [0] * world_size
    found: dict[str, Steps] = json.loads(out.read_text())
    return found


@pytest.fixture(scope="module")
def both(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path
) -> tuple[dict[str, Steps], dict[str, Steps]]:
    """The same sweep on one rank and on two; the second reuses the cache of the first."""
    folder = tmp_path_factory.mktemp("losses")
    write_scored(folder)
    write_experts(folder, tiny_model)
    return measured(folder, tiny_model, 1), measured(folder, tiny_model, 2)


@pytest.mark.parametrize("name", sorted(SWEEP))
def test_results_do_not_depend_on_ranks_or_micro_batches(both: Both, name: str) -> None:
    alone, together = both
    expected = alone[f"{name}, {BUDGETS[-1]}"]
    assert len(expected) == STEPS
    assert all(math.isfinite(step["loss"]) and step["grad_norm"] > 1e-4 for step in expected)
    for found in (alone[f"{name}, {BUDGETS[0]}"], *(together[f"{name}, {budget}"] for budget in BUDGETS)):
        for ours, theirs in zip(found, expected, strict=True):
            for key in COMPARED + (OF_EXPERTS if name.startswith("experts") else ()):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=2e-6), key


def test_the_losses_differ_from_each_other(both: Both) -> None:
    alone, _ = both
    first = {name: alone[f"{name}, {BUDGETS[0]}"][1]["grad_norm"] for name in SWEEP}
    assert len({round(norm, 6) for norm in first.values()}) == len(SWEEP)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Rig:
    return make_rig(tmp_path_factory.mktemp("rig"), tiny_model, checkpoint_every=2, max_steps=4)


def test_a_loss_without_a_reference_needs_no_cache_from_start_to_report(rig: Rig, tmp_path: Path) -> None:
    keys = ("--loss.type", "simpo", "--loss.beta", "2", "--reference.cache_dir", str(tmp_path / "none"))
    keys += ("--evaluate.num_prompts", "4", "--evaluate.completion_tokens", "4")
    cached = rig.run("simpo", *keys, command="precompute-ref", world_size=1, stage=None)
    assert "not needed: simpo" in cached.output
    run_dir = rig.completed("simpo", *keys, world_size=1, stage=None)
    assert not (tmp_path / "none").exists()
    assert not (run_dir / "reference.json").exists()
    assert rig.run("simpo", *keys, command="evaluate", world_size=1, stage=None).statuses == [0]
    report = (run_dir / "report" / "report.md").read_text()
    assert "- loss: simpo, beta 2, simpo gamma 0.5" in report
    assert "- reference cache: none: the loss needs no reference" in report
    assert "with reference" not in (run_dir / "model" / "README.md").read_text()


def test_kto_learns_from_labels_from_the_cache_to_the_report(rig: Rig) -> None:
    rows = [
        {"prompt": f"{n} the cat " + "sat " * (n % 5), "completion": f" {word} {n}", "label": word == "good"}
        for n in range(60)
        for word in ("good", "bad")
        if (n + len(word)) % 3  # most prompts have one of the two
    ]
    labels = rig.folder / "labels.jsonl"
    labels.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = (
        "--loss.type",
        "kto",
        "--loss.beta",
        "0.5",
        "--data.train",
        str(labels),
        "--data.test",
        str(labels),
    )
    keys += ("--evaluate.num_prompts", "4", "--evaluate.completion_tokens", "4")
    cached = rig.run("kto", *keys, command="precompute-ref", world_size=1, stage=None)
    assert f"{len(rows)} labelled completions, {len(rows) // 2} of them desirable," in cached.output
    run_dir = rig.completed("kto", *keys, world_size=1, stage=None)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    first, last = lines[0], [line for line in lines if "eval/loss" in line][-1]
    assert first["eval/loss"] == pytest.approx(0.5, abs=1e-6)  # law 1
    assert first["eval/rewards/accuracies"] == 0.5
    assert last["eval/rewards/accuracies"] > 0.9
    assert last["eval/rewards/chosen"] > last["eval/rewards/rejected"]
    margins = [line["train/rewards/margins"] for line in lines if "train/loss" in line]
    assert margins[0] == pytest.approx(0, abs=1e-5)
    assert margins[-1] > 0.1
    assert rig.run("kto", *keys, command="evaluate", world_size=1, stage=None).statuses == [0]
    report = (run_dir / "report" / "report.md").read_text()
    assert "- loss: kto, beta 0.5, desirable weight 1, undesirable weight 1" in report
    assert "| labelled desirable |" in report


def test_a_loss_that_weighs_tokens_needs_log_probs_per_token(rig: Rig) -> None:
    keys = ("--loss.ld_alpha", "0.5")
    ended = rig.run("lengths", *keys, world_size=1, stage=None)
    assert ended.statuses == [2]
    assert "dpo precompute-ref" in ended.message
    assert "reference.store_token_logps: true" in ended.message
    assert not (rig.folder / "lengths" / "metrics.jsonl").exists()
    added = rig.run(
        "lengths",
        *keys,
        "--reference.store_token_logps",
        "true",
        command="precompute-ref",
        world_size=1,
        stage=None,
    )
    assert added.statuses == [0]
    run_dir = rig.completed("lengths", *keys, world_size=1, stage=None)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["eval/loss"] == pytest.approx(math.log(2), abs=1e-6)  # law 1, with log-probs per token
    assert lines[-1]["eval/loss"] < math.log(2)


def test_score_margin_weights_need_scores(rig: Rig) -> None:
    ended = rig.run("weights", "--loss.pair_weights", "score_margin", world_size=1, stage=None)
    assert ended.statuses == [2]
    assert "loss.pair_weights: score_margin" in ended.message


def test_a_run_does_not_resume_with_a_different_loss(rig: Rig) -> None:
    rig.completed("resumed", "--train.max_steps", "2", world_size=1, stage=None)
    more = ("--train.resume_allow", "train.max_steps")
    ended = rig.run("resumed", *more, "--loss.type", "[ipo,hinge]", world_size=1, stage=None)
    assert ended.statuses == [2]
    assert "loss.type: sigmoid -> " in ended.message
