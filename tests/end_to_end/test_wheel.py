"""The wheel that a registry would have: the command, the types, and the files that `dpo init` copies."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project installed from its wheel, into a folder of its own."""
    source, work = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in files:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():
            (source / name).write_bytes((ROOT / name).read_bytes())
            (source / name).chmod((ROOT / name).stat().st_mode)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", work, source], check=True)
    (wheel,) = work.glob("cached_dpo-*.whl")
    install = [*pip, "install", "--no-deps", "--ignore-installed", "--prefix", work / "prefix", wheel]
    subprocess.run(install, check=True)  # without --ignore-installed pip removes the environment's own dpo
    return work / "prefix"


def run_installed(installed: Path, here: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (packages,) = installed.glob("lib/python*/site-packages")
    environment = {**os.environ, "PYTHONPATH": str(packages), "PYTHON": sys.executable, "PYTHONSAFEPATH": "1"}
    return subprocess.run(arguments, cwd=here, env=environment, capture_output=True, text=True, check=False)


def test_the_commands_of_the_readme_work_from_a_wheel(installed: Path, tmp_path: Path) -> None:
    copied = run_installed(installed, tmp_path, sys.executable, "-m", "dpo", "init", ".")
    assert copied.returncode == 0, copied.stderr
    for folder in ("configs", "launch"):
        shipped = {path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file()}
        shipped = {path for path in shipped if "__pycache__" not in path.parts}
        found = {path.relative_to(tmp_path) for path in (tmp_path / folder).rglob("*") if path.is_file()}
        assert found == shipped
        for name in shipped:
            assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes()
            assert os.access(tmp_path / name, os.X_OK) == os.access(ROOT / name, os.X_OK)
    started = run_installed(installed, tmp_path, "launch/run", "train", "--config", "configs/demo.yaml")
    assert started.returncode == 2  # it starts, and there is no model yet
    assert "model.name_or_path" in started.stderr
    assert "runs/demo_base/model" in started.stderr
    (packages,) = installed.glob("lib/python*/site-packages")
    assert (packages / "dpo" / "py.typed").is_file()
    assert (packages / "dpo" / "report" / "page.html").is_file()
    assert (packages / "data_prep" / "cli.py").is_file()


def test_the_environment_of_the_tests_keeps_its_own_installation(installed: Path, tmp_path: Path) -> None:
    code = "import importlib.metadata, dpo; importlib.metadata.version('cached-dpo'); print(dpo.__file__)"
    found = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert Path(found.stdout.strip()).is_relative_to(ROOT)


def test_files_of_ones_own_are_not_overwritten(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "run").write_text("mine\n")
    refused = run_installed(installed, tmp_path, sys.executable, "-m", "dpo", "init", ".")
    assert refused.returncode == 2
    assert "launch/run with other content" in refused.stderr
    assert not (tmp_path / "configs").exists()
