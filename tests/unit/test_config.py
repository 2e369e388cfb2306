"""Every option is documented, and a range means what it says."""

import ast
import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest

from dpo.config import (
    Config,
    DataConfig,
    DataSource,
    ModelConfig,
    SftConfig,
    Within,
    flat,
    resolved,
)

# Their classes say what they are.
SECTIONS = {getattr(f.type, "__name__", f.type) for kind in (Config, SftConfig) for f in fields(kind)} - {
    "str"
}


def test_every_option_says_what_it_means() -> None:
    files = Path(__file__).parents[2].joinpath("dpo", "config").glob("*.py")
    classes = [node for file in files for node in ast.parse(file.read_text()).body]
    undocumented = []
    for section in (node for node in classes if isinstance(node, ast.ClassDef)):
        for node, after in zip(section.body, [*section.body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) not in SECTIONS:
                said = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                undocumented += [] if said else [f"{section.name}.{ast.unparse(node.target)}"]
    assert undocumented == []


@pytest.mark.parametrize(
    ("interval", "inside", "outside", "said"),
    [
        ("(0, inf)", [1e-9, 5], [0, -1, math.inf, math.nan], "above 0"),
        ("[0, inf)", [0, 5], [-1e-9, math.inf, math.nan], "at least 0"),
        ("[2, inf)", [2, 3], [1], "at least 2"),
        ("[0, 0.5)", [0, 0.49], [0.5, -0.1], "in [0, 0.5)"),
        ("(0, 1]", [1, 0.1], [0, 1.1], "in (0, 1]"),
    ],
)
def test_a_range_is_an_interval(interval: str, inside: list[float], outside: list[float], said: str) -> None:
    legal = Within(interval)
    assert all(value in legal for value in inside)
    assert not any(value in legal for value in outside)
    assert repr(legal) == said


def leaves(hint: Any) -> Iterator[Any]:
    """The types that a hint is made of, annotated ones whole."""
    if get_origin(hint) is Annotated or not get_args(hint):
        yield hint
    for part in get_args(hint) if get_origin(hint) is not Annotated else ():
        yield from leaves(part)


def sections(kind: type) -> Iterator[type]:
    yield kind
    for hint in get_type_hints(kind, include_extras=True).values():
        for leaf in leaves(hint):
            if is_dataclass(leaf):
                yield from sections(leaf)  # type: ignore[arg-type]


def test_every_number_has_a_range() -> None:
    without = [
        f"{section.__name__}.{name}"
        for kind in (Config, SftConfig)
        for section in sections(kind)
        for name, hint in get_type_hints(section, include_extras=True).items()
        if any(leaf in (int, float) for leaf in leaves(hint))
    ]
    assert without == []


def test_the_resolved_configuration_is_plain_and_flat_names_its_keys() -> None:
    config = Config(
        model=ModelConfig(name_or_path="m"), data=DataConfig(train=[DataSource(path="d", weight=2.0)])
    )
    nested = resolved(config)
    assert nested["data"]["train"] == [{"path": "d", "weight": 2.0}]
    assert flat(nested)["train.adam_betas"] == [0.9, 0.999]
    assert flat(nested)["run_dir"] == "runs/default"
