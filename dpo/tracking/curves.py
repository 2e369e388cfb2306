"""The places where a run's numbers are only shown: TensorBoard and other trackers.

They are worth less than the run: what fails here is said once and left out from then on.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch.utils.tensorboard import SummaryWriter

from dpo import terminal
from dpo.tracking.run_folder import RunFolder

FLUSH_SECONDS = 3
WRITER_THREAD = "_AsyncWriterThread"


class Tracker(Protocol):
    """Another place where curves go, such as one of Accelerate's trackers."""

    def log(self, values: dict[str, Any], step: int | None) -> Any:
        """Records the values of a step."""

    def finish(self) -> Any:
        """Closes it."""


class Curves:
    """TensorBoard and trackers of one run, on the main process."""

    def __init__(self, folder: RunFolder, first_step: int, trackers: Sequence[Tracker], charts: Any) -> None:
        """Opens TensorBoard's file.

        Args:
            folder: The run folder.
            first_step: Curves after it, of an interrupted run, are removed.
            trackers: Opened already.
            charts: TensorBoard's Custom Scalars.
        """
        self._trackers = {id(tracker): tracker for tracker in trackers}
        self._writer: SummaryWriter | None = None

        def open_writer() -> None:
            self._writer = SummaryWriter(
                str(folder.tensorboard),
                purge_step=first_step + 1 if first_step else 0,
                flush_secs=FLUSH_SECONDS,
            )
            self._writer.add_custom_scalars(charts)

        _quiet_writer_threads()
        self._with_writer(lambda writer: None, opens=open_writer)

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """One point per curve."""

        def add(writer: SummaryWriter) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        self._with_writer(add)
        for key, tracker in list(self._trackers.items()):
            try:
                tracker.log(dict(values), step)
            except Exception as error:  # each has its own
                del self._trackers[key]
                terminal.warning(f"{type(tracker).__name__} receives no more numbers: {error}")

    def histogram(self, tag: str, values: npt.NDArray[np.float64], step: int) -> None:
        """A distribution, in TensorBoard."""
        self._with_writer(lambda writer: writer.add_histogram(tag, values, step))

    def text(self, tag: str, content: str, step: int) -> None:
        """A text in Markdown, in TensorBoard."""
        self._with_writer(lambda writer: writer.add_text(tag, content, step))

    def close(self) -> None:
        """Flushes and closes them."""
        self._with_writer(lambda writer: writer.close())
        for tracker in self._trackers.values():
            try:
                tracker.finish()
            except Exception as error:
                terminal.warning(f"{type(tracker).__name__} could not be closed: {error}")

    def _with_writer(
        self, work: Callable[[SummaryWriter], None], *, opens: Callable[[], None] | None = None
    ) -> None:
        try:
            if opens is not None:
                opens()
            if self._writer is not None:
                work(self._writer)
        except OSError as error:
            self._writer = None
            terminal.warning(
                f"TensorBoard's curves end here ({error.strerror or error}); the run continues, and "
                "metrics.jsonl has the same numbers"
            )


def _quiet_writer_threads() -> None:
    """Leaves a failure of TensorBoard's thread to the call that meets it next, without a traceback."""
    plain = threading.excepthook

    def hook(failure: threading.ExceptHookArgs) -> None:
        writes = type(failure.thread).__name__ == WRITER_THREAD and isinstance(failure.exc_value, OSError)
        if not writes:
            plain(failure)

    hook.__name__ = f"except_{WRITER_THREAD}"
    if getattr(plain, "__name__", "") != hook.__name__:
        threading.excepthook = hook
