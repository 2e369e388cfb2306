"""Their data sets as `data.train` and `data.test`: TRL's dataset_name, and mixtures of three forms."""

from collections.abc import Mapping
from typing import Any

from dpo.convert.lines import Given, Lines, mapped, not_mapped, not_needed

KEYS = (
    "dataset_name",
    "dataset_config",
    "dataset_train_split",
    "dataset_test_split",
    "dataset_mixer",
    "dataset_splits",
    "dataset_mixture",
    "datasets",
    "test_split_size",
    "dataset_streaming",
    "streaming",
    "dataset_configs",
)


def data_lines(theirs: Given, given: Given) -> Lines:
    """What becomes of the keys of `KEYS`."""
    evaluates = (
        given.get("do_eval") or given.get("eval_strategy", given.get("evaluation_strategy", "no")) != "no"
    )
    used = {"dataset_streaming", "streaming"}
    if mixture := given.get("dataset_mixture"):
        used.add("dataset_mixture")
        yield from _mixture({"dataset_mixture": "..."}, mixture)
    elif "datasets" in theirs:
        used |= {"datasets", "test_split_size"}
        yield from _mixture({"datasets": "..."}, given)
    elif "dataset_mixer" in theirs:
        used |= {"dataset_mixer", "dataset_splits"}
        yield _mixer(given)
    elif "dataset_name" in theirs:
        used |= {"dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split"}
        yield _named(theirs, evaluates=bool(evaluates))
    for key, value in theirs.items():
        if key in ("dataset_streaming", "streaming"):
            yield not_needed({key: value}, "rows are read in blocks, and token ids are kept on disk")
        elif key not in used:
            yield not_mapped({key: value}, "there is no such option; see data.train in dpo train --help")


def _named(theirs: Given, *, evaluates: bool) -> Any:
    """TRL's dataset_name with its configuration and splits."""
    path, name = theirs["dataset_name"], theirs.get("dataset_config")
    train = _source(path, name, theirs.get("dataset_train_split", "train"), 1.0, default="train")
    ours = {"data.train": train}
    if evaluates:
        test = _source(path, name, theirs.get("dataset_test_split", "test"), 1.0, default="test")
        ours["data.test"] = {"path": test} if isinstance(test, str) else test
    return mapped(theirs, ours)


def _mixer(given: Given) -> Any:
    """The handbook's dataset_mixer, {name: share}, with dataset_splits."""
    mixer, splits = given["dataset_mixer"], given.get("dataset_splits", ["train", "test"])
    ours: dict[str, Any] = {}
    for key in ("train", "test"):
        sources = [
            _source(path, None, split, float(share) if key == "train" else 1.0, default=key)
            for path, share in mixer.items()
            for split in splits
            if str(split).startswith(key)
        ]
        if sources:
            ours[f"data.{key}"] = sources[0] if len(sources) == 1 else sources
    return mapped({"dataset_mixer": mixer, "dataset_splits": splits}, ours)


def _mixture(theirs: Given, mixture: Mapping[str, Any]) -> Lines:
    """Lists of data sets: the handbook's dataset_mixture, or TRL's datasets."""
    sources = []
    for item in mixture["datasets"]:
        path, name = item.get("id", item.get("path")), item.get("config", item.get("name"))
        files = item.get("data_files")
        weight = item.get("weight", item.get("fraction"))
        where = files if isinstance(files, str) else path
        sources.append(
            _source(
                where,
                name,
                item.get("split", "train"),
                1.0 if weight is None else float(weight),
                default="train",
            )
        )
        for key in ("data_dir", "data_files"):
            if item.get(key) is not None and not (key == "data_files" and isinstance(files, str)):
                yield not_mapped(
                    {f"datasets of {path}: {key}": item[key]}, "name files or a pattern as data.train"
                )
    yield mapped(theirs, {"data.train": sources[0] if len(sources) == 1 else sources})
    if size := mixture.get("test_split_size"):
        yield not_mapped({"test_split_size": size}, "no split is made: name held-out data as data.test")


def _source(path: str, name: str | None, split: str, weight: float, *, default: str) -> Any:
    """One data set: its path alone where nothing else differs from the defaults."""
    options = {
        "name": name if name != "default" else None,
        "split": split if split != default else None,
        "weight": weight if weight != 1 else None,
    }
    given = {key: value for key, value in options.items() if value is not None}
    return {"path": path, **given} if given else path
