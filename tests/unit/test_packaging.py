"""The files that say which versions are meant, against each other."""

import re
import tomllib
from pathlib import Path

import dpo

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LINTERS = ("ruff", "mypy", "types-")
"""Of the development tools, those that no test needs."""


def split(requirement: str) -> tuple[str, tuple[int, ...]]:
    """Name and version of `name>=1.2` or `name==1.2.0`, without zeros at the version's end."""
    found = re.fullmatch(r"([\w.\[\]-]+)[>=]=([\d.]+)", requirement)
    assert found is not None, requirement
    version = [int(part) for part in found[2].split(".")]
    while version[-1] == 0:
        version.pop()
    return found[1], tuple(version)


def lines_of(name: str) -> list[str]:
    return [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]


def test_the_minimum_is_what_the_project_declares() -> None:
    extras = PROJECT["optional-dependencies"]
    declared = [*PROJECT["dependencies"], *(one for extra in extras.values() for one in extra)]
    wanted = [one for one in declared if not one.startswith((PROJECT["name"], *LINTERS))]
    listed = lines_of("requirements.minimum")
    assert dict(map(split, listed)) == dict(map(split, wanted))
    tools = {split(one)[0] for one in extras["dev"] if not one.startswith(PROJECT["name"])}
    assert all("==" in line for line in listed if split(line)[0] not in tools)


def test_the_lock_satisfies_the_project() -> None:
    locked = {
        name.lower().replace("_", "-"): version for name, version in map(split, lines_of("requirements.lock"))
    }
    for extra in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
        for requirement in extra:
            if not requirement.startswith(PROJECT["name"]):
                name, oldest = split(requirement)
                assert locked[re.sub(r"\[.*", "", name).lower()] >= oldest, requirement


def test_every_locked_package_but_torch_has_hashes() -> None:
    blocks = (ROOT / "requirements.hashes").read_text().replace("\\\n", " ").splitlines()
    hashed = [block.split() for block in blocks if block and not block.startswith("#")]
    assert all(len(words) > 1 and all(len(word) == 78 for word in words[1:]) for words in hashed)
    locked = dict(map(split, lines_of("requirements.lock")))
    torch = locked.pop("torch")
    assert torch == (2, 13)
    found = dict(split(words[0]) for words in hashed)
    assert {re.sub(r"[._]", "-", name.lower()): version for name, version in locked.items()} == found


def test_the_citation_and_the_changelog_name_the_version() -> None:
    assert f"\nversion: {dpo.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {dpo.__version__}" in (ROOT / "CHANGELOG.md").read_text()
