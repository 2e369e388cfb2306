"""Some rows of every source through the real reader and tokenizer: what `dpo check` knows of the data.

Rows are taken at the start of a source, between, and at its end; nothing is written.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dpo.config import DataConfig
from dpo.data.blocks import Block, Lines, blocks_of, row_blocks, tables_of
from dpo.data.build import check_prompt_length, listed, resolve_max_length, same_data
from dpo.data.hub import hub_rows
from dpo.data.locate import suffix_of
from dpo.data.notes import RowNotes
from dpo.data.parts import groups_of, options_for
from dpo.data.records import plain_ids
from dpo.data.sources import PreferenceSource
from dpo.data.tokenize import tokenize_groups
from dpo.errors import UserError

ROWS_PER_PLACE = 32
MOST_FILES = 4
_TAIL_BYTES = 1 << 16


def preview_data(
    train: list[PreferenceSource],
    test: list[PreferenceSource],
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    positions: int | None,
) -> tuple[list[str], list[str], int, str]:
    """Reads some rows of all sources, and tokenizes them.

    Args:
        train: From `dpo.data.build.train_sources_of`.
        test: From `test_sources_of`.
        data: How they become token ids.
        tokenizer: The policy's; None where it does not exist yet: rows are read alone.
        positions: The model's longest sequence in tokens, or None without a limit.

    Returns:
        Lines for people that say what was looked at and what of it is not used, warnings, the largest token
        id, or -1, and the option that names rows with labels instead of pairs, or nothing.

    Raises:
        UserError: Data that training would refuse, as far as these rows tell.
    """
    max_length = resolve_max_length(data.max_length, positions)
    check_prompt_length(data, max_length)
    notes, warnings, largest, labelled = [], same_data(train, test), -1, ""
    for source in (*train, *test):
        found = RowNotes()
        largest = max(largest, _read(source, data, max_length, tokenizer, found))
        notes += [f"{source.key}: {source.path}: looked at {found.rows} rows", *found.lines(source.path)]
        warnings += found.warnings(source.path)
        labelled = labelled or (source.key if found.labelled else "")
    return notes, warnings, largest, labelled


def _read(
    source: PreferenceSource,
    data: DataConfig,
    max_length: int,
    tokenizer: PreTrainedTokenizerBase | None,
    notes: RowNotes,
) -> int:
    """Reads some rows of a source; returns the largest token id. UserError if none of them is left."""
    kept, largest = 0, -1
    for block in some_blocks(source):
        groups = groups_of(source, block, data, notes)
        if tokenizer is None:
            kept += sum(1 for _ in groups)
            continue
        options = options_for(source, data, max_length)
        for group in tokenize_groups(groups, tokenizer, options, Counter(), notes):
            kept += 1
            segments = (group.prompt, *group.completions)
            largest = max(largest, *(int(plain_ids(ids).max()) for ids in segments))
    if not kept:
        what = f"{source.key}: {source.path}: nothing left after filtering: {listed(notes.drops)}"
        raise UserError("\n".join([what, *notes.drop_lines(source.path)]))
    return largest


def some_blocks(source: PreferenceSource) -> Iterator[Block]:
    """Some rows at the start of a source, between, and at its end; of a packed file, of its first block."""
    options = source.options
    if not source.files:
        yield from row_blocks(hub_rows(options, source.split, source.key, ROWS_PER_PLACE), source.path)
        return
    last = len(source.files) - 1 if options.rows is None else 0
    for index in sorted({round(place * last / (MOST_FILES - 1)) for place in range(MOST_FILES)}):
        blocks = _of_file(source.files[index])
        yield from blocks if options.rows is None else (block.part(0, options.rows) for block in blocks)


def _of_file(file: Path) -> Iterator[Block]:
    tables = [*tables_of(file)] if suffix_of(file.name) in (".parquet", ".arrow") else []
    first = tables[0] if tables else next(blocks_of(file), None)
    if first is None:
        return
    yield first.part(0, ROWS_PER_PLACE)
    if len(tables) > 1:
        yield tables[len(tables) // 2].part(0, ROWS_PER_PLACE)
        yield _end_of(tables[-1])
    elif isinstance(first, Lines) and suffix_of(file.name) == ".jsonl" and first.num_bytes < _size(file):
        yield _lines_from(file, _size(file) // 2).part(0, ROWS_PER_PLACE)
        yield _end_of(_lines_from(file, max(_size(file) - _TAIL_BYTES, first.num_bytes - 1)))
    elif first.num_rows > ROWS_PER_PLACE:
        yield _end_of(first.part(ROWS_PER_PLACE, first.num_rows))


def _end_of(block: Block) -> Block:
    return block.part(max(block.num_rows - ROWS_PER_PLACE, 0), ROWS_PER_PLACE)


def _size(file: Path) -> int:
    return file.stat().st_size


def _lines_from(file: Path, start: int) -> Lines:
    """The whole lines after a place in a file, with their numbers."""
    with file.open("rb") as content:
        number = 1
        while content.tell() < start:
            number += content.read(min(1 << 20, start - content.tell())).count(b"\n")
        content.readline()
        lines = content.read(_TAIL_BYTES).split(b"\n")
        at_end = content.tell() == _size(file)
    lines = lines if at_end else lines[:-1]
    return Lines(name=str(file), first=number + 1, num_bytes=0, lines=lines)
