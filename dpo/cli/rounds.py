"""The options of `dpo rounds`."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from dpo.cli.parse import parse
from dpo.config import Config
from dpo.errors import UserError

USAGE = """usage: dpo rounds --config FILE --rounds N [--prompts SOURCE] [--reference start|previous]
                  [--kl_limit NATS] [--patience 1] [--launcher COMMAND] [--output FOLDER]
                  [--sample "OPTIONS"] [--KEY VALUE ...]

On-policy rounds: each samples the current policy on prompts that it has not seen, scores them with
evaluate.scorer, makes pairs by data.pairing, fills the reference cache, trains on from the policy, and
evaluates against the model of the start. Run the same command again to continue: finished parts are kept.

--rounds      how many; the training prompts are divided among them
--prompts     a preference folder, whose prompts are used, or a text; default: data.train
--reference   start: every round is held to the first model, whose cache is shared; previous: to the policy
              that the round started from (iterative DPO)
--kl_limit    stop after a round whose KL from the start exceeds this
--patience    stop after this many rounds without a higher score; 0: never
--sample      further options of `data_prep sample`, such as "--num_samples 8 --temperature 1"
--launcher    what starts a stage, before its name; default: launch/run where there is one, else this
              interpreter alone
--output      default: the configuration's run_dir with _rounds behind it
"""


def run_rounds(arguments: list[str]) -> int:
    """`dpo rounds`: its own options here, all others are keys of the configuration."""
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--prompts")
    parser.add_argument("--reference", choices=("start", "previous"), default="start")
    parser.add_argument("--kl_limit", type=float)
    parser.add_argument("--patience", type=int, default=1)
    parser.add_argument("--sample", default="")
    parser.add_argument("--launcher")
    parser.add_argument("--output")
    options, keys = parser.parse_known_args(arguments)
    wrong = [
        *([f"--rounds: {options.rounds}; expected at least 1"] if options.rounds < 1 else []),
        *([f"--patience: {options.patience}; expected at least 0"] if options.patience < 0 else []),
        *(
            [f"--kl_limit: {options.kl_limit}; expected above 0"]
            if options.kl_limit is not None and not options.kl_limit > 0
            else []
        ),
    ]
    if wrong:
        raise UserError("; ".join(wrong) + ": see dpo rounds --help")
    config = cast(Config, parse("train", keys))
    if options.prompts is None and not isinstance(config.data.train, str):
        raise UserError("--prompts: none, and data.train is not a single path; expected a folder or a text")
    from dpo.commands.rounds import Rounds, run_rounds

    run_rounds(
        Rounds(
            config=config,
            keys=keys,
            number=options.rounds,
            prompts=options.prompts or str(config.data.train),
            reference=options.reference,
            kl_limit=options.kl_limit,
            patience=options.patience,
            sample=_sampling(options.sample),
            launcher=_launcher(options.launcher),
            output=Path(options.output or f"{config.run_dir}_rounds"),
        )
    )
    return 0


OWN = (
    "--output",
    "--overwrite",
    "--model",
    "--dtype",
    "--scorer",
    "--seed",
    "--part",
    "--train_only",
    "--pairing",
    "--min_margin",
)
"""Options of `data_prep sample` that the rounds give."""


def _sampling(words: str) -> list[str]:
    given = shlex.split(words)
    if taken := [word for word in given if word.partition("=")[0] in OWN]:
        raise UserError(f"--sample: {taken[0]} is given by the rounds: leave it out (see dpo rounds --help)")
    return given


def _launcher(words: str | None) -> Sequence[str]:
    here = Path("launch/run")
    if words:
        return shlex.split(words)
    return [str(here)] if here.is_file() else [sys.executable, "-m"]
