"""Who may import whom: the table of docs/map.md, read off the imports of every module."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

GROUND = {
    f"dpo.{name}"
    for name in (
        "alive",
        "processes",
        "errors",
        "config",
        "terminal",
        "files",
        "distributed",
        "interrupts",
        "pools",
        "random_bits",
    )
}
"""Open to every room; these modules import nothing of ours but each other."""
ROOMS = {  # a room -> the rooms it may import, besides itself and the ground
    "dpo.data": set[str](),
    "dpo.loss": set(),
    "dpo.convert": {"dpo.loss"},
    "dpo.tracking": set(),
    "dpo.model": {"dpo.data"},
    "dpo.evaluate": {"dpo.data", "dpo.loss", "dpo.model"},
    "dpo.engine": {"dpo.data", "dpo.model"},
    "dpo.report": {"dpo.data", "dpo.evaluate", "dpo.loss", "dpo.tracking"},
    "dpo.reference": {"dpo.data", "dpo.engine", "dpo.model"},
    "dpo.guards": {"dpo.data", "dpo.engine", "dpo.tracking"},
    "dpo.train": {
        "dpo.data",
        "dpo.engine",
        "dpo.guards",
        "dpo.loss",
        "dpo.model",
        "dpo.reference",
        "dpo.tracking",
    },
    "dpo.planning": {"dpo.data", "dpo.engine", "dpo.evaluate", "dpo.model", "dpo.reference", "dpo.train"},
    "dpo.commands": {"dpo"},
    "dpo.__init__": {"dpo.commands"},  # for type checkers: importing dpo imports nothing else
    "dpo.cli": {"dpo.loss.catalog", "dpo.tracking.exit_record", "dpo.tracking.run_folder"},
    "dpo.__main__": {"dpo.cli"},
    "data_prep": {"dpo.data", "dpo.evaluate", "dpo.model"},
}
LATE = {
    "dpo.__main__": {"dpo.distributed"},
    "dpo.cli": {"dpo.commands"},
    "dpo.commands": {"dpo.model.lora"},
    "dpo.model": {"dpo.model.projection_kernels"},
    "data_prep": {"dpo.data", "dpo.distributed", "dpo.evaluate", "dpo.model"},
}
"""A room -> what it may import inside functions: `--help` must not load torch, `dpo check` no classes of
models that it does not need, and a CPU no triton.
"""
MODULES = [
    path
    for package in ("dpo", "data_prep")
    for path in sorted((ROOT / package).rglob("*.py"))
    if path.read_text()
]


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name if name == "dpo.__init__" else name.removesuffix(".__init__")  # dpo alone is every room


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def room_of(module: str) -> str:
    for name in GROUND:
        if is_in(module, name):
            return name
    (room,) = [room for room in ROOMS if is_in(module, room)]
    return room


def imports_of(tree: ast.AST) -> Iterator[str]:
    """The modules of ours that a piece of code imports."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found = [f"{node.module}.{alias.name}" for alias in node.names]
            # `from dpo import files` imports a module, `from dpo.files import sync` a name of one
            names = [name if _is_module(name) else str(node.module) for name in found]
        yield from (name for name in names if is_in(name, "dpo") or is_in(name, "data_prep"))


def _is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def split_late(path: Path) -> tuple[set[str], set[str]]:
    """What a module imports when it is imported, and what its functions import when they run."""
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    late = {module for function in functions for module in imports_of(function)}
    return {*imports_of(tree)} - late, late


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_a_module_imports_what_the_table_allows(path: Path) -> None:
    name = module_name(path)
    room = room_of(name)
    early, late = split_late(path)
    allowed = GROUND if room in GROUND else GROUND | ROOMS[room] | {room}
    assert [m for m in sorted(early) if not any(is_in(m, package) for package in allowed)] == []
    assert [m for m in sorted(late) if not any(is_in(m, package) for package in LATE.get(room, ()))] == []


def test_the_table_has_no_circle() -> None:
    below = {room: {other for other in rooms if other in ROOMS} for room, rooms in ROOMS.items()}
    below["dpo.commands"] = {*ROOMS} - {
        "dpo.commands",
        "dpo.cli",
        "dpo.__init__",
        "dpo.__main__",
        "data_prep",
    }
    done: list[str] = []
    while len(done) < len(below):
        ready = [room for room, others in below.items() if room not in done and others <= {*done}]
        assert ready, f"circle among {[room for room in below if room not in done]}"
        done += ready


def arrows_between_modules() -> dict[str, set[str]]:
    arrows = {module_name(path): {*imports_of(ast.parse(path.read_text()))} for path in MODULES}
    return {name: {other for other in others if other in arrows} for name, others in arrows.items()}


@pytest.mark.parametrize("command", ["check", "precompute_ref", "train", "sft"])
def test_ranks_that_draw_nothing_do_not_import_matplotlib(command: str) -> None:
    arrows = arrows_between_modules()
    reached, ahead = set[str](), {f"dpo.commands.{command}"}
    while ahead:
        reached |= ahead
        ahead = {other for name in ahead for other in arrows[name]} - reached
    assert "dpo.data.parts" in reached  # through dpo.data.build
    assert "dpo.report.figures" not in reached


def test_no_module_imports_itself_through_others() -> None:
    arrows = arrows_between_modules()
    while leaves := [name for name, others in arrows.items() if not others]:
        arrows = {name: others - {*leaves} for name, others in arrows.items() if name not in leaves}
    assert arrows == {}


def test_the_root_holds_the_ground_and_the_entry_alone() -> None:
    at_root = {path.stem for path in (ROOT / "dpo").glob("*.py")} - {"__init__"} | {"config"}
    assert at_root == {name.removeprefix("dpo.") for name in GROUND} | {"__main__"}


def test_the_largest_file_is_short_enough_to_read() -> None:
    long = {module_name(path): n for path in MODULES if (n := len(path.read_text().splitlines())) >= 320}
    assert long == {}


def test_below_the_commands_functions_take_sections_of_the_configuration() -> None:
    """A function that needs the learning rate takes `config.train`, and can be called without the rest."""
    whole = {"Config", "SftConfig"}
    found = []
    for path in MODULES:
        if room_of(module_name(path)) in {"dpo.commands", "dpo.cli", "dpo.config", "dpo.__init__"}:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "dpo.config":
                found += [module_name(path) for alias in node.names if alias.name in whole]
    assert found == []


def test_the_table_is_read_as_it_is_meant() -> None:
    tree = ast.parse(
        "import torch\nimport dpo.loss.pairs\nfrom dpo import distributed\nfrom dpo.data.plan import share\n"
    )
    assert list(imports_of(tree)) == ["dpo.loss.pairs", "dpo.distributed", "dpo.data.plan"]
    assert is_in("dpo.data.plan", "dpo.data")
    assert not is_in("dpo.database", "dpo.data")
