"""The Python interface: an experiment, whose methods do what the commands of their names do.

They work in this process, or in every rank of a script that `accelerate launch` started, and raise errors
instead of printing them.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from dpo.cli.parse import checked, parse
from dpo.commands import evaluate, inputs, precompute_ref, train
from dpo.config import Config
from dpo.data.dataset import TokenizedDataset


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """What training reads."""

    train: TokenizedDataset
    """Groups of token ids: `len(train)` and `train[index]`."""
    test: TokenizedDataset | None
    """Held-out groups, if there are any."""
    tokenizer: PreTrainedTokenizerBase
    """The policy's."""


class Experiment:
    """One configuration and what can be done with it.

    Args:
        config: Every option.

    Raises:
        UserError: Everything that is wrong with it, one problem a line.
    """

    def __init__(self, config: Config) -> None:
        self.config = checked(config)

    @classmethod
    def read(cls, path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> "Experiment":
        """The experiment in a YAML file.

        Args:
            path: The file, as after `--config`.
            overrides: Dotted key -> value, as on the command line: {"train.learning_rate": 5e-7}.

        Raises:
            UserError: Everything that is wrong with it, one problem a line.
        """
        given = [f"--{key}={_written(value)}" for key, value in (overrides or {}).items()]
        return cls(cast(Config, parse("train", ["--config", os.fspath(path), *given])))

    def open_data(self) -> Data:
        """Tokenizes the data, or opens what was tokenized before.

        Raises:
            UserError: The data or the tokenizer is not usable.
        """
        train_data, test_data, tokenizer = inputs.open_data(self.config.data, self.config.model)
        return Data(train=train_data, test=test_data, tokenizer=tokenizer)

    def precompute_ref(self) -> None:
        """Fills the reference cache with what `train` and `evaluate` read of it.

        Raises:
            UserError: Data, reference model or cache is not usable.
        """
        precompute_ref.precompute_ref(self.config)

    def train(self) -> dict[str, float]:
        """Optimizes the policy; the model is in RUN_DIR/model. Resumes a run that was interrupted.

        Returns:
            The last held-out metrics by name (`eval/rewards/accuracies`, ...); empty without held-out data,
            and where the run had finished before.

        Raises:
            UserError: Data, model, cache or run folder is not usable.
            StoppedBySignal: After a checkpoint; the same call resumes.
        """
        return train.train(self.config)

    def evaluate(self) -> dict[str, float]:
        """Held-out metrics and samples of the trained policy; writes RUN_DIR/report.

        Returns:
            What report/summary.json holds; empty on ranks other than 0.

        Raises:
            UserError: There is no trained policy or no held-out data, or something of them is not usable.
        """
        return evaluate.evaluate(self.config)


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
