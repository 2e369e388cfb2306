"""Preference groups -> the folder that training reads: train.parquet, test.parquet and manifest.json.

Every source of data_prep ends here. The folder appears complete or not at all. At most a thousand groups per
split are in memory; Parquet pages have checksums.
"""

import argparse
import json
import shutil
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import pyarrow as pa
import pyarrow.parquet as pq

from dpo import terminal
from dpo.data.notes import RowNotes
from dpo.data.records import NO_RIVAL, PreferenceGroup
from dpo.errors import UserError
from dpo.files import publish_folder, remove_abandoned, sha256_of, sync_tree, temporary_of

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")

_GROUPS_PER_WRITE = 1024
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_PAIRS = pa.list_(pa.struct([("chosen", pa.int32()), ("rejected", pa.int32())]))


class PreferenceWriter:
    """Writes one folder of preference files; a context manager.

    On a clean exit the manifest is written and the folder takes its place; on an error nothing is left.

        with PreferenceWriter(output, overwrite=False, completions_are_complete=True, source={...}) as writer:
            writer.write("train", group)
    """

    def __init__(
        self, output: Path, *, overwrite: bool, completions_are_complete: bool, source: dict[str, Any]
    ) -> None:
        """Checks that `output` may be written.

        Args:
            output: The folder to make; missing, empty, or with `overwrite` one with a manifest.
            overwrite: Replace preference files that are there.
            completions_are_complete: Whether completions end where their author ended, so that EOS follows,
                or were cut at a fixed length.
            source: What the data is made from and with which options, for the manifest; JSON values.

        Raises:
            UserError: `output` is a file, or a folder that may not be replaced.
        """
        self.notes = RowNotes()
        """What the rows lost and what of them is not used; goes into the manifest."""
        self.drops = self.notes.drops
        """Dropped rows (and pairs) by reason."""
        self.sources: list[dict[str, Any]] = []
        """The files that were read, each as from `describe_file`; goes into the manifest."""
        self._output = output.resolve()
        self.folder = temporary_of(self._output)
        """The folder while it is written; a source may put further files here."""
        self._complete = completions_are_complete
        self._source = source
        self._buffers: dict[Split, list[PreferenceGroup]] = {split: [] for split in SPLITS}
        self._files: dict[Split, pq.ParquetWriter] = {}
        self._rows: Counter[Split] = Counter()
        self._num_pairs = 0
        self._as_messages: bool | None = None
        _check_output(output, overwrite=overwrite)

    def __enter__(self) -> Self:
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            remove_abandoned(self.folder.parent)
            self.folder.mkdir()
        except OSError as error:
            raise UserError(f"--output: {self._output} cannot be written ({error.strerror})") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for split in SPLITS if kind is None else ():
                self._flush(split)
            for file in self._files.values():
                file.close()
            if kind is None:
                self._finish()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def describe(self, **more: Any) -> None:
        """Adds to what the data is made from, for the manifest; JSON values."""
        self._source |= more

    def write(self, split: Split, group: PreferenceGroup) -> None:
        """Adds one group. Raises UserError when text and message prompts are mixed."""
        as_messages = not isinstance(group.prompt, str)
        if self._as_messages is None:
            self._as_messages = as_messages
        if as_messages is not self._as_messages:
            raise UserError(
                "the data has both text prompts and message prompts; expected one kind. Prepare each kind by "
                "itself, and give the folders as a list in data.train"
            )
        self._buffers[split].append(group)
        self._rows[split] += 1
        self._num_pairs += len(group.pairs)
        if len(self._buffers[split]) >= _GROUPS_PER_WRITE:
            self._flush(split)

    def write_all(self, groups: Iterable[tuple[Split, PreferenceGroup]]) -> None:
        """Adds a stream of groups, with a progress bar."""
        for split, group in terminal.progress(groups, description="data_prep", unit="groups"):
            self.write(split, group)

    def _flush(self, split: Split) -> None:
        groups = self._buffers[split]
        if not groups:
            return
        if split not in self._files:
            self._files[split] = pq.ParquetWriter(
                self.folder / f"{split}.parquet",
                self._schema(),
                compression="zstd",
                write_page_checksum=True,
            )
        rows = [
            {
                "prompt": group.prompt,
                "completions": group.completions,
                **_preferences(group),
                "scores": group.scores,
                "reference_scores": group.reference_scores,
                "id": group.id,
            }
            for group in groups
        ]
        self._files[split].write_table(pa.Table.from_pylist(rows, schema=self._schema()))
        groups.clear()

    def _schema(self) -> pa.Schema:
        return pa.schema(
            [
                ("prompt", _MESSAGES if self._as_messages else pa.string()),
                ("completions", pa.list_(pa.string())),
                ("pairs", _PAIRS),
                ("labels", pa.list_(pa.bool_())),
                ("scores", pa.list_(pa.float64())),
                ("reference_scores", pa.list_(pa.float64())),
                ("id", pa.string()),
            ]
        )

    def _finish(self) -> None:
        dropped = dict(self.drops.most_common())
        if not self._rows["train"]:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in dropped.items())
            raise UserError(
                f"nothing left after filtering: {self._rows['test']} test groups and no training groups; "
                + "\n".join([f"dropped: {reasons or 'nothing'}", *self.notes.drop_lines("input")])
            )
        manifest = {
            "format_version": FORMAT_VERSION,
            "source": self._source,
            "sources": self.sources,
            "rows": {split: self._rows[split] for split in SPLITS},
            "pairs": self._num_pairs,
            "dropped": dropped,
            "unused_columns": dict(self.notes.ignored.most_common()),
            "completions_are_complete": self._complete,
            "created_with": version("cached-dpo"),
        }
        text = json.dumps(manifest, indent=2, ensure_ascii=False)
        (self.folder / MANIFEST).write_text(f"{text}\n", encoding="utf-8")
        terminal.note(*self.notes.lines("input"))
        terminal.warning(*self.notes.warnings("input"))
        sync_tree(self.folder)
        publish_folder(self.folder, self._output)


def _preferences(group: PreferenceGroup) -> dict[str, Any]:
    """Pairs, or the label of each completion where they have no rivals."""
    if not any(NO_RIVAL in pair for pair in group.pairs):
        return {"pairs": [pair._asdict() for pair in group.pairs], "labels": None}
    desirable = {pair.chosen for pair in group.pairs}
    return {"pairs": None, "labels": [index in desirable for index in range(len(group.completions))]}


def describe_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The command line for the manifest: source and options, without the place of the output."""
    return {name: value for name, value in vars(args).items() if name not in ("output", "overwrite")}


def describe_file(path: Path) -> dict[str, Any]:
    """Name, size in bytes and SHA-256 of a file, for the manifest."""
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _check_output(output: Path, *, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise UserError(f"--output: {output} is a file; expected a folder to make")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not overwrite:
        raise UserError(f"--output: {output} is not empty; choose another folder, or add --overwrite")
    if not (output / MANIFEST).is_file():  # data_prep did not write this folder
        raise UserError(f"--output: {output} holds other files than preference files; choose another folder")
