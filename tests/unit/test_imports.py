"""Who may import whom: the table of the design, read off the imports of every module."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SHARED = {"dpo.errors", "dpo.records", "dpo.config"}
DATA = {"dpo.data", "dpo.distributed", "dpo.terminal"}
MODEL = {"dpo.model", "dpo.data.trees"}
REFERENCE = {"dpo.reference", "dpo.data", "dpo.model", "dpo.frozen", "dpo.distributed", "dpo.terminal"}
MAY_IMPORT = {  # a module or package -> what it may import of ours, besides dpo.errors
    "dpo.errors": set[str](),
    "dpo.records": set(),
    "dpo.config": set(),
    "dpo.distributed": set(),
    "dpo.ending": set(),
    "dpo.history": set(),
    "dpo.terminal": set(),
    "dpo.cards": {"dpo.config", "dpo.loss.options"},
    "dpo.trackers": {"dpo.distributed"},
    "dpo.flops": {"dpo.data.dataset"},
    "dpo.figures": {"dpo.history", "dpo.evaluate.statistics"},
    "dpo.signals": set(),
    "dpo.stopwatch": set(),
    "dpo.watchdog": {"dpo.distributed", "dpo.ending"},
    "dpo.optimizer": {"dpo.config"},
    "dpo.sharding": set(),
    "dpo.running": {"dpo"},
    "dpo.__main__": {"dpo.cli"},
    "dpo.loss": SHARED | {"dpo.loss"},
    "dpo.monitor": {"dpo.distributed", "dpo.history", "dpo.terminal"},
    "dpo.data": SHARED | DATA,
    "dpo.model": SHARED | MODEL,
    "dpo.frozen": SHARED | {"dpo.model", "dpo.distributed", "dpo.data.trees"},
    "dpo.engine": SHARED
    | {"dpo.model", "dpo.distributed", "dpo.data.trees", "dpo.optimizer"}
    | {"dpo.frozen", "dpo.sharding"},
    "dpo.reference": SHARED | REFERENCE,
    "dpo.evaluate": SHARED | REFERENCE | {"dpo.evaluate", "dpo.loss", "dpo.figures", "dpo.history"},
    "dpo.train": SHARED
    | {"dpo.train", "dpo.reference", "dpo.loss", "dpo.monitor", "dpo.engine", "dpo.data", "dpo.model"}
    | {"dpo.frozen", "dpo.distributed", "dpo.optimizer", "dpo.signals", "dpo.stopwatch", "dpo.watchdog"}
    | {"dpo.history", "dpo.terminal"},
    "dpo.planning": SHARED
    | {"dpo.planning", "dpo.data", "dpo.model", "dpo.frozen", "dpo.reference", "dpo.sharding"}
    | {"dpo.evaluate.statistics", "dpo.train.space", "dpo.flops"},
    "dpo.problems": {"dpo.config", "dpo.loss.options"},
    "dpo.arguments": {"dpo.config", "dpo.problems"},
    "dpo.cli": {"dpo.arguments", "dpo.config", "dpo.ending", "dpo.subcommands", "dpo.terminal"},
    "dpo.subcommands": {"dpo.arguments", "dpo.config"},
    "dpo.compare": {"dpo.config", "dpo.figures", "dpo.history", "dpo.terminal", "dpo.evaluate.statistics"},
    "dpo.stages": {"dpo.terminal"},
    "dpo.frontier": {"dpo.config", "dpo.figures", "dpo.history", "dpo.terminal", "dpo.evaluate.statistics"}
    | {"dpo.stages"},
    "dpo.commands": {"dpo"},
    "dpo.checking": {"dpo"},
    "dpo.cache": {"dpo"},
    "data_prep": {
        "data_prep",
        "dpo.records",
        "dpo.config",
        "dpo.distributed",
        "dpo.terminal",
        "dpo.data.load",
    }
    | {"dpo.data.pairing", "dpo.model.load", "dpo.evaluate.sampling", "dpo.evaluate.scoring"},
}
CLI = {"dpo.cli", "dpo.subcommands"}
MODULES = [
    path
    for package in ("dpo", "data_prep")
    for path in sorted((ROOT / package).rglob("*.py"))
    if path.read_text()
]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def imports_of(tree: ast.AST) -> Iterator[str]:
    """The modules of ours that a piece of code imports."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found = [f"{node.module}.{alias.name}" for alias in node.names]
            # `from dpo import engine` imports a module, `from dpo.engine import Engine` a name of one
            names = [name if _is_module(name) else str(node.module) for name in found]
        yield from (name for name in names if is_in(name, "dpo") or is_in(name, "data_prep"))


def _is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_a_module_imports_what_the_table_allows(path: Path) -> None:
    name = module_name(path)
    rules = [allowed for package, allowed in MAY_IMPORT.items() if is_in(name, package)]
    assert len(rules) == 1, f"{name} has no place in the table"
    tree = ast.parse(path.read_text())
    if name in CLI:  # commands are imported late, inside functions: test below
        tree.body = [node for node in tree.body if not isinstance(node, ast.FunctionDef)]
    allowed = {*rules[0], "dpo.errors"}
    assert [m for m in imports_of(tree) if not any(is_in(m, package) for package in allowed)] == []


def test_the_command_line_imports_the_commands_inside_functions_only() -> None:
    late = {
        module
        for name in CLI
        for node in ast.parse((ROOT / name.replace(".", "/")).with_suffix(".py").read_text()).body
        if isinstance(node, ast.FunctionDef)
        for module in imports_of(node)
    }
    assert late == {"dpo.commands", "dpo.checking", "dpo.cache", "dpo.compare", "dpo.frontier"}


def test_elsewhere_in_the_project_nothing_of_ours_is_imported_late() -> None:
    late = []
    for path in MODULES:
        functions = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)
        ]
        late += [module_name(path) for function in functions for _ in imports_of(function)]
    assert {name for name in late if name.startswith("dpo.")} == CLI


def test_the_table_is_read_as_it_is_meant() -> None:
    tree = ast.parse(
        "import torch\nimport dpo.loss.pairs\nfrom dpo import engine\nfrom dpo.data.plan import share\n"
    )
    assert list(imports_of(tree)) == ["dpo.loss.pairs", "dpo.engine", "dpo.data.plan"]
    assert is_in("dpo.data.plan", "dpo.data")
    assert not is_in("dpo.database", "dpo.data")
