"""dpo rounds: sample the policy, score, pair, train on, evaluate; and again with prompts it has not seen.

Every part is an ordinary command, started once each by a journal: `data_prep sample`, `precompute-ref`,
`train`, `evaluate`. Killed anywhere, the same command goes on at the unfinished part.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from dpo import terminal
from dpo.commands.journal import Journal, start
from dpo.config import Config
from dpo.errors import UserError
from dpo.files import write_file
from dpo.report import labels
from dpo.report.figures import Point, save_png, score_against_kl
from dpo.report.markdown import table
from dpo.tracking.run_folder import RunFolder

JOURNAL = "done.json"
COLUMNS = (
    "score/policy",
    "positive_share/policy",
    "win_rate",
    "judge/win_rate",
    "kl/sequence",
    "eval/rewards/accuracies",
    "sample_tokens/policy",
    "distinct_2/policy",
)
"""Metrics of the table that a round has, in its order; with their intervals where they have one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """What is done in each round, and when it is enough."""

    config: Config
    keys: Sequence[str]
    """The command-line arguments of `config`; every stage gets them, too."""
    number: int
    """Of rounds, at most."""
    prompts: str
    """A preference folder or a text; each round has its own part."""
    reference: Literal["start", "previous"]
    """What training is held to."""
    kl_limit: float | None
    """Nats per sequence from the start, after which no further round is begun."""
    patience: int
    """Rounds without a higher score after which no further one is begun; 0: no limit."""
    sample: Sequence[str]
    """Further options of `data_prep sample`."""
    launcher: Sequence[str]
    """The command before `data_prep` or the name of a stage: launch/run, or an interpreter and -m."""
    output: Path

    @property
    def start(self) -> str:
        """The model that the first round starts from, and that every round is evaluated against."""
        return self.config.model.name_or_path


def run_rounds(rounds: Rounds) -> None:
    """Runs what is not done, and writes rounds.md, rounds.json and rounds.png.

    Raises:
        UserError: The configuration has no scorer or no prompts, or a stage exited with status 2.
        StoppedBySignal: A stage was stopped; finished stages are skipped next time.
        RunFailed: A stage failed.
    """
    _check(rounds)
    rounds.output.mkdir(parents=True, exist_ok=True)
    done: list[dict[str, float]] = []
    reason = f"all {rounds.number} rounds are done"
    for number in range(1, rounds.number + 1):
        done.append(_one_round(rounds, number))
        _write(rounds, done)
        if found := reason_to_stop(done, kl_limit=rounds.kl_limit, patience=rounds.patience):
            reason = found
            break
    best = max(range(len(done)), key=lambda index: done[index]["score/policy"])
    print(rounds_table(done))
    terminal.summary(
        "rounds",
        {
            "ended": reason,
            "best": f"round {best + 1}: {_run(rounds, best + 1).model()}",
            "table": f"{rounds.output / 'rounds.md'}\nall numbers are in rounds.json",
            "figure": str(rounds.output / "rounds.png"),
            "next": f"dpo chat {_run(rounds, best + 1).path}",
        },
    )


def reason_to_stop(done: Sequence[dict[str, float]], *, kl_limit: float | None, patience: int) -> str | None:
    """Why no further round is worth its time, or None. Pure.

    Args:
        done: The summaries of the rounds so far, at least one, in their order.
        kl_limit: KL from the start that no round should exceed, in nats per sequence.
        patience: Rounds without a higher score than all before, the model of the start included; 0: no limit.
    """
    kl = done[-1]["kl/sequence"]
    if kl_limit is not None and kl > kl_limit:
        return f"the KL from the start is {kl:.2f} nats, above {kl_limit:g}"
    scores = [done[0]["score/reference"], *(summary["score/policy"] for summary in done)]
    best = scores.index(max(scores))
    since = len(scores) - 1 - best
    if patience and since >= patience:
        where = f"since round {best}" if best else "in any round"
        return f"the score has not risen {where} ({scores[best]:.3f}, now {scores[-1]:.3f})"
    return None


def rounds_table(done: Sequence[dict[str, float]]) -> str:
    """One row per round, in Markdown."""
    columns = [name for name in COLUMNS if any(name in summary for summary in done)]
    rows = [
        [str(number), *(_cell(summary, name) for name in columns)] for number, summary in enumerate(done, 1)
    ]
    return table(["round", *map(labels.short, columns)], rows) + "\n"


def _cell(summary: dict[str, float], name: str) -> str:
    if name not in summary:
        return ""
    if f"{name}/low" not in summary:
        return f"{summary[name]:.3f}"
    return f"{summary[name]:.3f} [{summary[f'{name}/low']:.3f}, {summary[f'{name}/high']:.3f}]"


def _check(rounds: Rounds) -> None:
    config, problems = rounds.config, list[str]()
    if config.evaluate.scorer is None:
        problems.append("evaluate.scorer: none; expected one, such as vader: rounds make pairs of scores")
    if config.evaluate.num_prompts < 1:
        problems.append("evaluate.num_prompts: 0; expected at least 1: rounds are compared by samples")
    if config.reference.model is not None:
        problems.append("reference.model: leave it out; --reference says what a round is held to")
    if config.model.lora is not None and config.model.lora.export == "adapter":
        problems.append("model.lora.export: adapter; the next round starts from a whole model: set merged")
    if problems:
        raise UserError("\n".join(problems))


def _run(rounds: Rounds, number: int) -> RunFolder:
    return RunFolder(rounds.output / f"round_{number}" / "run")


def _one_round(rounds: Rounds, number: int) -> dict[str, float]:
    """Runs the commands of a round that are not done, and reads its summary."""
    run, data = _run(rounds, number), rounds.output / f"round_{number}" / "data"
    journal, settings = Journal(file=rounds.output / JOURNAL), asdict(rounds.config)
    commands = list(_commands(rounds, number, run, data))
    for index, (name, command, product) in enumerate(commands):
        if product is not None:
            journal.once(f"round {number}: {name}", command, product, settings)
        elif any(made and not journal.is_done(then, made, settings) for _, then, made in commands[index:]):
            start(f"round {number}: {name}", command)
    summary: dict[str, float] = json.loads((run.report() / "summary.json").read_text())
    return summary


def _commands(
    rounds: Rounds, number: int, run: RunFolder, data: Path
) -> Iterator[tuple[str, list[str], Path | None]]:
    """Name, words and last product of each command of a round.

    A command without a product fills the cache: it is started as long as one after it is not done.
    """
    config = rounds.config
    assert config.evaluate.scorer is not None
    policy = rounds.start if number == 1 else str(_run(rounds, number - 1).model())
    own_held_out = number == 1 and config.data.test is None  # all rounds have one seed, and hold out the same
    yield (
        "sample",
        [
            *rounds.launcher, "data_prep", "sample", rounds.prompts,
            "--model", policy, "--dtype", config.model.dtype, "--scorer", config.evaluate.scorer,
            "--pairing", config.data.pairing, "--min_margin", f"{config.data.min_margin:g}",
            "--seed", str(config.train.seed), "--output", str(data), "--overwrite",
            *(["--part", f"{number}/{rounds.number}"] if rounds.number > 1 else []),
            *([] if own_held_out else ["--train_only"]), *rounds.sample,
        ],
        data / "manifest.json",
    )  # fmt: skip
    held_to = rounds.start if rounds.reference == "start" else policy
    keys = [
        *rounds.keys, "--run_dir", str(run.path), "--data.train", str(data), "--model.name_or_path", policy,
    ]  # fmt: skip
    if number > 1 and config.data.test is None:
        keys += ["--data.test", str(rounds.output / "round_1" / "data")]
    stage = [*rounds.launcher, *([] if rounds.launcher[-1].endswith("launch/run") else ["dpo"])]
    against = [*keys, "--reference.model", held_to]
    yield "precompute-ref", [*stage, "precompute-ref", *against], None
    yield "train", [*stage, "train", *against], run.model() / "README.md"
    from_start = [*keys, "--reference.model", rounds.start]
    if held_to != rounds.start:
        yield "precompute-ref of the start", [*stage, "precompute-ref", *from_start], None
    yield "evaluate", [*stage, "evaluate", *from_start], run.report() / "summary.json"


def _write(rounds: Rounds, done: Sequence[dict[str, float]]) -> None:
    write_file(rounds.output / "rounds.json", json.dumps([*done], indent=2))
    write_file(rounds.output / "rounds.md", rounds_table(done))
    curves = {
        "reference": [Point.of_reference(done[0])],
        "policy, by round": [Point.of(summary, str(number)) for number, summary in enumerate(done, 1)],
    }
    save_png(score_against_kl(curves), rounds.output / "rounds.png")
