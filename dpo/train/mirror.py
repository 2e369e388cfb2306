"""A copy of the run folder behind a URL (s3://, gs://, ...), for disks that do not last: `train.mirror`.

Files are copied after each checkpoint, while training goes on; its manifest comes last, so that a checkpoint
with a manifest is whole. The same command on an empty disk copies the newest one back, verifies every file
against the signed manifest, and goes on. The key of the signature is copied too: whoever may write to the
URL can make the run load what they wrote.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from threading import Thread

from dpo import alive, terminal
from dpo.errors import UserError
from dpo.files import WRITING, publish_folder, remove, sync_tree, temporary_of
from dpo.tracking.run_folder import RunFolder
from dpo.train.manifest import MANIFEST, NotValid, complete_checkpoints, read_manifest, verify

CHECKPOINTS = "checkpoints"


class Mirror:
    """The copy of one run folder. One process uses it."""

    def __init__(self, url: str, folder: RunFolder) -> None:
        """Opens it; nothing is read or written yet.

        Raises:
            UserError: No package here speaks the URL's protocol.
        """
        import fsspec

        self._url, self._folder = url, folder
        try:
            self._store, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UserError(f"train.mirror: {url}: {error}; install the package for such URLs") from error
        self._root = PurePosixPath(root)
        self._sent: dict[str, tuple[int, int]] = {}
        self._thread: Thread | None = None

    def check(self) -> None:
        """Reads what is there.

        Raises:
            UserError: It cannot be reached, or is the copy of another run.
        """
        with self._readable():
            self._whole()
            self._require_same_run()

    def restore(self) -> None:
        """Copies the newest checkpoint and what belongs to it, if the run folder has none as new.

        Raises:
            UserError: As `check`, or no checkpoint of it is valid.
        """
        with self._readable():
            self._require_same_run()
            here = max((_step(path.name) for path in complete_checkpoints(self._folder)), default="")
            newer = [name for name in self._whole() if name > here]
            if newer and not any(self._fetched(name) for name in reversed(newer)) and not here:
                raise UserError(
                    f"train.mirror: {self._url} has no valid checkpoint: choose another URL and run_dir"
                )

    def send(self) -> None:
        """Begins to copy what is new in the run folder, after what was begun before is done."""
        self.wait()
        names = list(self._local_names())  # now: whole checkpoints that stay until `wait` was called
        self._thread = Thread(target=self._send, args=(names,), name="mirror", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Waits until the copy that was begun is done, or has failed with a warning."""
        thread, self._thread = self._thread, None
        while thread is not None and thread.is_alive():
            thread.join(timeout=1)

    def _send(self, names: list[str]) -> None:
        try:
            whole = set(self._whole())
            for name in names:
                if _checkpoint_of(name) not in whole:
                    self._put(name)
            kept = {_checkpoint_of(name) for name in names}
            for obsolete in sorted(whole - kept):
                self._store.rm_file(self._at(CHECKPOINTS, obsolete, MANIFEST))
                self._store.rm(self._at(CHECKPOINTS, obsolete), recursive=True)
        except Exception as error:  # the run is worth more than its copy
            terminal.warning(
                f"train.mirror: {self._url} is not up to date: {_said(error)}; what is missing is copied "
                "with the next checkpoint, or at the next start"
            )

    def _put(self, name: str) -> None:
        file = self._folder.path / name
        state = file.stat()
        if self._sent.get(name) == (state.st_size, state.st_mtime_ns):
            return
        target = self._at(name)
        self._store.makedirs(str(PurePosixPath(target).parent), exist_ok=True)
        self._store.put_file(str(file), target)
        self._sent[name] = (state.st_size, state.st_mtime_ns)
        alive.advanced()

    def _local_names(self) -> Iterator[str]:
        """Files of the run folder in the order in which they are copied: manifests last, no hidden ones."""
        checkpoints = [path for path in complete_checkpoints(self._folder) if not path.name.startswith(".")]
        place = self._folder.checkpoints
        others = (path for path in self._folder.path.iterdir() if path not in (place, *_own(self._folder)))
        for path in (*sorted(others), *checkpoints):
            files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
            names = [str(file.relative_to(self._folder.path)) for file in files]
            yield from sorted(
                (name for name in names if not any(part.startswith(".") for part in Path(name).parts)),
                key=lambda name: (PurePosixPath(name).name == MANIFEST, name),
            )

    def _whole(self) -> list[str]:
        """Names of the mirrored checkpoints that are whole, oldest first."""
        self._store.invalidate_cache()
        found = self._store.glob(self._at(CHECKPOINTS, "step_*", MANIFEST))
        return sorted(PurePosixPath(path).parent.name for path in found)

    def _require_same_run(self) -> None:
        key = self._at(self._folder.key.name)
        if not self._store.exists(key):
            return
        if self._folder.key.is_file() and self._store.cat_file(key) != self._folder.key.read_bytes():
            raise UserError(
                f"train.mirror: {self._url} is the copy of another run than {self._folder.path}; choose "
                "another URL, or delete that copy"
            )

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # each store has failures of its own
            raise UserError(
                f"train.mirror: {self._url} cannot be read ({_said(error)}); log in to that store, or leave "
                "it out"
            ) from error

    def _fetched(self, name: str) -> bool:
        """Copies a checkpoint and everything beside the checkpoints; whether it is valid."""
        terminal.note(f"train.mirror: copying {name} of {self._url} into {self._folder.path}")
        final = self._folder.checkpoints / name
        building = final.with_name(f".{name}{WRITING}")
        remove(building)
        root = self._at()
        for path in sorted(map(str, self._store.find(root))):
            relative = PurePosixPath(path).relative_to(root)
            if relative.parts[0] != CHECKPOINTS:
                self._get(path, self._folder.path / relative)
            elif relative.parts[1] == name:
                self._get(path, building.joinpath(*relative.parts[2:]))
        try:
            verify(building, read_manifest(building).files)
        except NotValid as problem:
            terminal.warning(f"train.mirror: {name} of {self._url} is not used: {problem}")
            remove(building)
            return False
        sync_tree(building)
        publish_folder(building, final)
        return True

    def _get(self, path: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        incoming = temporary_of(target)
        self._store.get_file(path, str(incoming))
        if target == self._folder.key:
            incoming.chmod(0o600)
        incoming.replace(target)
        alive.advanced()

    def _at(self, *parts: str) -> str:
        return str(self._root.joinpath(*parts))


def _own(folder: RunFolder) -> tuple[Path, ...]:
    """What says how a process on this machine runs or ended: no part of the copy."""
    return folder.lock, folder.exit_record, folder.stacks


def _checkpoint_of(name: str) -> str | None:
    """The checkpoint that a file of the copy belongs to."""
    parts = PurePosixPath(name).parts
    return parts[1] if parts[0] == CHECKPOINTS else None


def _step(name: str) -> str:
    """The name of a checkpoint, of one that was being replaced too."""
    return name.lstrip(".").partition(".")[0]


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'no reason given'}"[:200]
