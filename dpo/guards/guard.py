"""How a run ends."""

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from dpo import distributed, terminal
from dpo.config import Config, SftConfig
from dpo.data.trees import TreeBatch
from dpo.engine.engine import Engine
from dpo.errors import RunFailed, StoppedBySignal, UserError
from dpo.guards.signals import StopRequestedError, StopRequests, end_with_launcher
from dpo.guards.watchdog import Watchdog
from dpo.tracking.trackers import check_trackers


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """What watches over a command: see `guarded`."""

    command: str
    """train or sft."""
    stop: StopRequests
    watchdog: Watchdog

    def score_only(self, policy: Engine) -> Callable[..., Tensor]:
        """`Engine.score_only`, which raises StopRequestedError on all ranks after a signal."""

        def score(batch: TreeBatch, *, per_token: bool = False) -> Tensor:
            self.watchdog.progress("evaluation")
            if distributed.any_rank(self.stop.requested):
                raise StopRequestedError
            return policy.score_only(batch, per_token=per_token)

        return score


@contextmanager
def guarded(command: str, config: Config | SftConfig) -> Iterator[Guard]:
    """Joins the ranks; signals become wishes, and an error that another rank caused becomes its reason."""
    quiet()
    distributed.start()
    check_trackers(config.train.trackers)
    end_with_launcher()
    watchdog = Watchdog(Path(config.run_dir), command, config.train.stuck_after_seconds)
    with StopRequests() as stop, watchdog:
        try:
            yield Guard(command=command, stop=stop, watchdog=watchdog)
        except (UserError, StoppedBySignal, RunFailed) as error:
            watchdog.farewell(error)
            raise
        except Exception as error:
            reason = watchdog.explain(error)
            if reason is error:
                raise
            raise reason from error


def quiet() -> None:
    """Silences what a user cannot act on: other libraries' progress notes and deprecations among
    themselves.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if terminal.mode() != "plain" or not sys.stderr.isatty():
        disable_progress_bar()  # of loading and writing weights
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
