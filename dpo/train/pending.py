"""A checkpoint between its snapshot and its publication: a thread writes while training goes on.

Another thread then removes what it made obsolete, so that training waits for neither.
"""

import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from threading import Thread

from dpo.train.manifest import FileDigests


class PendingCheckpoint:
    """A checkpoint that is being written, perhaps by a thread while training goes on."""

    def __init__(
        self,
        write: Callable[[], FileDigests],
        finish: Callable[[Callable[[], FileDigests]], tuple[Path, list[Path]]],
        *,
        in_background: bool,
    ) -> None:
        """Starts to write.

        Args:
            write: Writes this rank's files and returns their digests, or raises.
            finish: Publishes the checkpoint, given what `write` gives, and returns it and what is then
                obsolete. All ranks call it.
            in_background: Whether to write in a thread; else `finish` does.
        """
        self._write, self._finish = write, finish
        self._outcome: Future[FileDigests] = Future()
        self._thread = Thread(target=self._work, name="checkpoint", daemon=True)
        self._remover: Thread | None = None
        if in_background:
            self._thread.start()

    @property
    def written(self) -> bool:
        """Whether this rank has written its files, or failed to."""
        return self._outcome.done()

    def finish(self) -> Path:
        """Waits for all ranks and publishes the checkpoint. All ranks must call it.

        Raises:
            UserError: A rank could not write; the checkpoints before it are still there.
        """
        in_background = self._thread.ident is not None
        if not in_background:
            self._work()
        checkpoint, obsolete = self._finish(self._outcome.result)
        self._remover = Thread(target=_remove, args=(obsolete,), name="old checkpoints", daemon=True)
        self._remover.start()
        if not in_background:
            self._remover.join()
        return checkpoint

    def settle(self) -> None:
        """Waits for this rank's threads alone: one that was not finished is no checkpoint."""
        for thread in (self._thread, self._remover):
            if thread is not None and thread.ident is not None:
                thread.join()

    def _work(self) -> None:
        try:
            self._outcome.set_result(self._write())
        except Exception as error:  # raised by `finish`, where all ranks learn of it
            self._outcome.set_exception(error)


def _remove(folders: list[Path]) -> None:
    """Removes them; what is left after an error is removed with the next checkpoint, or at the next start."""
    for path in folders:
        shutil.rmtree(path, ignore_errors=True)
