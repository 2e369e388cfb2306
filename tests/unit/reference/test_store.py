"""The cache on disk: a folder that names its model, shards that may overlap, and merging by copying."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from unit.reference.samples import (
    IDENTITY,
    append,
    content,
    files,
    keys,
    made,
    padded,
    random_rows,
    raw,
    rows,
    token_rows,
)

from dpo.config import ModelConfig
from dpo.errors import UserError
from dpo.reference import store as store_module
from dpo.reference.identity import ReferenceIdentity, reference_identity
from dpo.reference.shards import read_shard, write_shard
from dpo.reference.store import RELOADS, ReferenceStore, reference_store

OTHER = replace(IDENTITY, weights={"model.safetensors": "bb" * 32})


def test_shards_of_several_builders_are_one_table(tmp_path: Path) -> None:
    first, second = made(tmp_path), made(tmp_path)
    append(first, {b"b": (-1.1, 3), b"a": (-1e-300, 1)})
    append(second, {b"c": (-123456.789, 99999)})
    expected = padded({b"a": (-1e-300, 1), b"b": (-1.1, 3), b"c": (-123456.789, 99999)})
    assert content(first) == content(second) == expected


def test_a_cache_that_was_never_made_is_empty(tmp_path: Path) -> None:
    assert content(ReferenceStore(tmp_path, IDENTITY)) == {}
    assert list(tmp_path.iterdir()) == []


def test_the_copy_in_use_is_the_one_written_first_whatever_the_order_of_writing_to_this_folder(
    tmp_path: Path,
) -> None:
    store = made(tmp_path)
    append(store, {b"a": (-1.0, 1), b"b": (-2.0, 1)})
    write_shard(
        store.path, rows({b"b": (-2.00001, 1)}), IDENTITY.digest, time_ns=7
    )  # an older one, copied in
    assert content(store) == padded({b"a": (-1.0, 1), b"b": (-2.00001, 1)})


def test_shards_that_disagree_are_refused_with_the_folder(tmp_path: Path) -> None:
    store = made(tmp_path)
    append(store, {b"a": (-1.0, 1), b"b": (-2.0, 10)})
    append(store, {b"b": (-2.1, 10)})
    with pytest.raises(UserError, match=rf"{store.path}: 1 rows "):
        store.load()


def test_the_compute_type_of_the_identity_decides_how_far_copies_may_differ(tmp_path: Path) -> None:
    store = made(tmp_path, replace(IDENTITY, dtype="bfloat16"))
    append(store, {b"b": (-2.0, 10)})
    append(store, {b"b": (-2.1, 10)})
    assert content(store) == padded({b"b": (-2.0, 10)})


def test_merging_two_caches_of_one_model_is_copying_shards(tmp_path: Path) -> None:
    here, there = made(tmp_path / "here"), made(tmp_path / "there")
    append(here, {b"a": (-1.0, 1), b"b": (-2.0, 1)})
    append(there, {b"b": (-2.00001, 1), b"c": (-3.0, 1)})
    there.append(token_rows({b"d": [-1.0, -3.0]}))
    for shard in there.shards():
        shutil.copy(shard, here.path)
    merged = padded({b"a": (-1.0, 1), b"b": (-2.0, 1), b"c": (-3.0, 1), b"d": (-4.0, 2)})
    assert content(here) == merged
    for shard in here.shards():  # and back: shards that are there already are replaced by equal ones
        shutil.copy(shard, there.path)
    assert content(there) == merged
    assert files(here.path) == files(there.path)


def test_a_shard_from_the_cache_of_another_model_is_refused(tmp_path: Path) -> None:
    store, other = made(tmp_path), made(tmp_path, OTHER)
    append(store, {b"a": (-1.0, 1)})
    copied = shutil.copy(append(other, {b"b": (-2.0, 1)}), store.path)
    with pytest.raises(UserError, match=rf"{copied}: a shard of another reference model"):
        store.load()
    Path(copied).unlink()
    assert len(content(store)) == 1


def test_only_rows_with_tokens_where_tokens_are_wanted(tmp_path: Path) -> None:
    store = made(tmp_path)
    append(store, {b"a": (-1.0, 1), b"b": (-3.0, 2)})
    store.append(token_rows({b"b": [-1.0, -2.0], b"c": [-4.0]}))
    assert raw(store.load().index.keys) == raw(keys(b"a", b"b", b"c"))
    assert raw(store.load(with_tokens=True).index.keys) == raw(keys(b"b", b"c"))


def test_the_folder_is_named_after_the_identity_and_holds_it(tmp_path: Path) -> None:
    store = made(tmp_path / "a" / "root")
    assert store.path == tmp_path / "a" / "root" / IDENTITY.digest[:16]
    assert json.loads((store.path / "identity.json").read_text()) == IDENTITY.to_json()
    before = files(store.path)
    store.create()  # again: the same
    assert files(store.path) == before
    assert list(before) == ["identity.json"]


def test_a_cache_that_cannot_be_made_is_refused_by_its_key(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=r"reference\.cache_dir: cannot write .*file/"):
        made(tmp_path / "file")


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (
            {"weights": {"model.safetensors": "bb" * 32}},
            r"weights\.model\.safetensors: bbbbbbbbbbbb -> aaaaaaaaaaaa",
        ),
        ({"config": {"n_layer": 3}}, r"config\.n_layer: 3 -> 2"),
        ({"dtype": "bfloat16"}, "dtype: bfloat16 -> float32"),
        (
            {"adapter": {"adapter_config.json": "cc" * 32}},
            r"adapter\.adapter_config\.json: cccccccccccc -> None",
        ),
    ],
)
def test_the_cache_of_another_model_under_our_name_is_refused_with_the_difference(
    tmp_path: Path, change: dict[str, Any], differs: str
) -> None:
    other = made(tmp_path, replace(IDENTITY, **change))
    append(other, {b"a": (-1.0, 1)})
    store = ReferenceStore(tmp_path, IDENTITY)
    shutil.move(other.path, store.path)
    for attempt in (store.load, store.create):
        with pytest.raises(UserError, match=rf"{store.path}: .* {differs}"):
            attempt()


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    def edit(file: Path) -> None:
        stored = json.loads(file.read_text())
        change(stored)
        file.write_text(json.dumps(stored))

    return edit


@pytest.mark.parametrize(
    "damage",
    [
        Path.unlink,
        lambda file: file.write_text("{"),
        lambda file: file.write_text("[]"),
        lambda file: file.write_bytes(b"\xff\xfe"),
        edited(lambda stored: stored.pop("digest")),
        edited(lambda stored: stored.pop("adapter")),
        edited(lambda stored: stored.update(more=1)),
        edited(lambda stored: stored.update(dtype="bfloat16")),
        edited(lambda stored: stored["config"].update(n_layer=3)),
        edited(lambda stored: stored.update(weights=["aa" * 32])),
    ],
    ids=[
        "gone",
        "cut off",
        "a list",
        "not UTF-8",
        "no digest",
        "no adapter",
        "an additional part",
        "another dtype",
        "another config",
        "weights as a list",
    ],
)
def test_shards_without_the_identity_they_were_written_with_are_refused(
    tmp_path: Path, damage: Callable[[Path], Any]
) -> None:
    store = made(tmp_path)
    append(store, {b"a": (-1.0, 1)})
    damage(store.path / "identity.json")
    for attempt in (store.load, lambda: ReferenceStore.at(store.path)):
        with pytest.raises(UserError, match=rf"{store.path}/identity.json: "):
            attempt()


def test_a_cache_can_be_opened_by_its_folder_alone(tmp_path: Path) -> None:
    store = made(tmp_path)
    append(store, {b"a": (-1.0, 1)})
    found = ReferenceStore.at(store.path)
    assert (found.identity, found.path, found.cache_dir) == (IDENTITY, store.path, tmp_path)
    assert content(found) == content(store)


def test_a_folder_under_another_name_is_refused(tmp_path: Path) -> None:
    store = made(tmp_path)
    moved = store.path.rename(tmp_path / "backup")
    with pytest.raises(UserError, match=rf"{moved}: identity.json .*{IDENTITY.digest[:16]}"):
        ReferenceStore.at(moved)


def test_the_folder_may_be_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = made(tmp_path)
    append(store, {b"a": (-1.0, 1)})
    monkeypatch.chdir(store.path)
    assert content(ReferenceStore.at(Path())) == content(store)


def nearest(folder: Path, *others: ReferenceIdentity) -> str | None:
    for other in others:
        made(folder, other)
    return made(folder).nearest_other()


def test_the_nearest_other_cache_is_named_with_what_differs(tmp_path: Path) -> None:
    near = replace(IDENTITY, config={"n_layer": 3})
    far = replace(IDENTITY, weights={"x": "cc" * 32, "y": "dd" * 32}, dtype="bfloat16")
    message = nearest(tmp_path, far, near)
    assert message is not None
    assert near.digest[:16] in message
    assert message.endswith(" config.n_layer: 3 -> 2")


def test_of_many_differences_the_first_are_shown(tmp_path: Path) -> None:
    message = nearest(tmp_path, replace(IDENTITY, config={f"key{i}": i for i in range(9)}))
    assert message is not None
    assert message.count(" -> ") == 4
    assert message.endswith("; ...")


def test_without_other_caches_there_is_no_nearest(tmp_path: Path) -> None:
    assert ReferenceStore(tmp_path / "no", IDENTITY).nearest_other() is None
    assert nearest(tmp_path) is None
    broken = made(tmp_path, OTHER)
    (broken.path / "identity.json").write_text("{")
    assert nearest(tmp_path) is None


def test_a_renamed_weight_file_does_not_make_another_cache(tmp_path: Path) -> None:
    made(tmp_path)
    renamed = replace(IDENTITY, weights={"model-00001-of-00001.safetensors": "aa" * 32})
    store = ReferenceStore(tmp_path, renamed)
    assert store.path.is_dir()  # file names are not in the digest
    assert store.nearest_other() is None


def joining(store: ReferenceStore, times: int) -> Callable[..., Any]:
    """A `read_shard` before which another process joins all shards, this many times."""
    left = times

    def read(path: Path, *arguments: Any, **options: Any) -> Any:
        nonlocal left
        if left:
            left -= 1
            joined = store_module.ReferenceRows.joined(
                [read_shard(old, IDENTITY.digest) for old in store.shards()]
            )
            old = store.shards()
            store.append(joined)
            for shard in old:
                shard.unlink()
        return read_shard(path, *arguments, **options)

    return read


@pytest.mark.parametrize("times", [1, RELOADS - 1])
def test_a_cache_whose_shards_are_joined_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    store = made(tmp_path)
    for seed in range(3):
        store.append(random_rows(5, seed))
    before = content(store)
    monkeypatch.setattr(store_module, "read_shard", joining(store, times))
    assert content(store) == before
    assert len(before) == 15
    assert len(store.shards()) == 1


def test_a_cache_whose_shards_keep_disappearing_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = made(tmp_path)
    store.append(random_rows(5))
    monkeypatch.setattr(store_module, "read_shard", joining(store, 99))
    with pytest.raises(UserError, match=str(store.path)):
        store.load()


def test_a_unfinished_file_is_not_a_shard(tmp_path: Path) -> None:
    store = made(tmp_path)
    append(store, {b"a": (-1.0, 1)})
    (store.path / ".part-00000000000000000001-abc.parquet.writing").write_bytes(b"half")
    assert list(content(store)) == raw(keys(b"a"))


def test_the_store_of_a_model_has_its_identity(tiny_model: Path, tmp_path: Path) -> None:
    model = ModelConfig(name_or_path=str(tiny_model), dtype="float32")
    store = reference_store(model, tmp_path / "caches")
    assert (store.cache_dir, store.identity) == (tmp_path / "caches", reference_identity(model, tmp_path))
