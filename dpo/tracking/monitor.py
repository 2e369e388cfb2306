"""Where a run's numbers go: the progress bar, metrics.jsonl, TensorBoard and other trackers.

Only the main process writes.
"""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from types import TracebackType

from dpo import distributed, terminal
from dpo.files import naming, write_file
from dpo.tracking.curves import Curves, Tracker
from dpo.tracking.history import History, load_history
from dpo.tracking.metrics import Evaluation
from dpo.tracking.run_folder import RunFolder

MARGINS = "eval/rewards/distribution_of_margins"  # TensorBoard shows one kind of plot per name
CHARTS = {
    "Training beside held-out": {
        name.rpartition("/")[2]: ["Multiline", [f"train/{name}", f"eval/{name}"]]
        for name in ("loss", "rewards/accuracies", "rewards/margins")
    },
    "Chosen beside rejected": {
        f"{kind}, {part}": ["Multiline", [f"{split}/{kind}/chosen", f"{split}/{kind}/rejected"]]
        for kind in ("rewards", "logps")
        for split, part in (("train", "training"), ("eval", "held-out"))
    },
}
"""TensorBoard's Custom Scalars: category -> chart -> the curves in it."""


class Monitor:
    """Progress bar, metrics.jsonl and TensorBoard of one run; does nothing on ranks other than the main
    one.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        num_steps: int,
        first_step: int,
        unit: str,
        evaluated: bool = True,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        """Opens the files; lines and curves after `first_step`, of an interrupted run, are removed.

        Args:
            folder: The run folder.
            num_steps: Optimizer steps of the whole run.
            first_step: Steps already done when this process starts.
            unit: What `perf/<unit>_per_second` counts, shown in the bar.
            evaluated: Whether the evaluation at `first_step`, if there is one, is kept.
            trackers: Receive the same numbers; used on the main process only.
        """
        self._unit = unit
        self._enabled = distributed.is_main()
        if not self._enabled:
            return
        # A run without a step starts afresh: what it measured before its first step is measured again.
        history = load_history(folder, until=first_step) if first_step else History()
        kept = [
            text
            for text, values in zip(history.texts, history.lines, strict=True)
            if values["step"] < first_step
            or (values["step"] == first_step and (evaluated or "eval/loss" not in values))
        ]
        if history.num_damaged:
            last = max((line["step"] for line in history.lines), default=0)
            terminal.warning(
                f"{folder.history}: {history.num_damaged} damaged line(s) were removed; it goes up to "
                f"step {last:g}, and the run resumes after step {first_step}"
            )
        write_file(folder.history, "".join(kept))
        self._history = folder.history
        self._file = folder.history.open("a", buffering=1)
        self._curves = Curves(folder, first_step, trackers, CHARTS)
        self._bar = terminal.bar(num_steps, description="train", unit="steps", initial=first_step)

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one line, and one point per curve.

        Args:
            step: Optimizer step, from 1; 0 for what is measured before the first.
            values: Finite numbers under the names that the README lists.

        Raises:
            OSError: metrics.jsonl could not be written; its name is in the error.
        """
        if not self._enabled:
            return
        with naming(self._history):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._curves.record(step, values)
        terminal.event("metrics", {"step": step, **values})

    def show(self, step: int, evaluation: Evaluation) -> None:
        """Writes an evaluation; TensorBoard also gets the histogram of margins, and samples."""
        self.record(step, evaluation.values)
        if not self._enabled:
            return
        if evaluation.margins is not None:
            self._curves.histogram(MARGINS, evaluation.margins, step)
        if evaluation.samples is not None:
            self._curves.text("eval/samples", evaluation.samples, step)

    def advance(self, values: Mapping[str, float]) -> None:
        """Advances the bar by one step and shows the numbers that people follow."""
        if not self._enabled:
            return
        shown = {
            "loss": ("train/loss", ".4f"),
            "acc": ("train/rewards/accuracies", ".2f"),
            "margin": ("train/rewards/margins", ".3f"),
            f"{self._unit}/s": (f"perf/{self._unit}_per_second", ".1f"),
        }
        self._bar.set_postfix(
            {label: f"{values[name]:{form}}" for label, (name, form) in shown.items() if name in values},
            refresh=False,
        )
        self._bar.update()

    def sync(self) -> None:
        """Flushes to disk, so that a checkpoint never knows of steps that the metrics lack."""
        if self._enabled:
            with naming(self._history):
                self._file.flush()
                os.fsync(self._file.fileno())

    def text(self, tag: str, content: str) -> None:
        """A text for TensorBoard, in Markdown."""
        if self._enabled:
            self._curves.text(tag, content, 0)

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes and flushes the files, also when the run fails."""
        if self._enabled:
            self._bar.close()
            self._curves.close()
            with nullcontext() if error is None else suppress(OSError):  # a full disk is the reason already
                self._file.close()
