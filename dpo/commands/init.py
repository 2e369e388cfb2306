"""dpo init: copies the ready-made configurations and launch scripts out of an installation."""

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from dpo import terminal
from dpo.errors import UserError
from dpo.files import write_file

DISTRIBUTION, SHARE = "cached-dpo", "share/cached-dpo/"
"""Name of the package on a registry, and where in an environment its wheel puts these files."""
FOLDERS = ("configs", "launch")


def init(target: Path) -> None:
    """Copies `configs/` and `launch/` into a folder. Files that are there with the same content are kept.

    Raises:
        UserError: A file of that name has other content, and nothing was copied; or the folder cannot be
            written to, and the same command goes on once it can.
    """
    shipped = shipped_files()
    changed = [
        name
        for name, source in shipped.items()
        if (target / name).exists() and (target / name).read_bytes() != source.read_bytes()
    ]
    if changed:
        raise UserError(
            f"{target}: has {', '.join(changed)} with other content; expected a folder without them: move "
            "yours away, or give another folder"
        )
    new = [name for name in shipped if not (target / name).exists()]
    try:
        for name in new:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            write_file(target / name, shipped[name].read_bytes(), mode=shipped[name].stat().st_mode & 0o777)
    except OSError as error:
        raise UserError(
            f"{target}: cannot be written to: {error.strerror}; make room there, or give another folder"
        ) from error
    terminal.summary(
        "init",
        {
            "copied": f"{len(new)} files to {', '.join(str(target / name) for name in FOLDERS)}",
            "next": "launch/run train --config configs/FILE, or launch/demo; launch/README.md says more",
        },
    )


def shipped_files() -> dict[str, Path]:
    """Name of each file of `configs/` and `launch/`, such as configs/demo.yaml -> where it is."""
    checkout = Path(__file__).parents[2]
    if (checkout / "launch" / "run").is_file():
        found = [path for folder in FOLDERS for path in sorted((checkout / folder).rglob("*"))]
        return {
            str(path.relative_to(checkout)): path
            for path in found
            if path.is_file() and "__pycache__" not in path.parts
        }
    try:
        installed = files(DISTRIBUTION) or []
    except PackageNotFoundError:
        installed = []
    named = {
        str(file).partition(SHARE)[2]: Path(str(file.locate())) for file in installed if SHARE in str(file)
    }
    if not named:
        raise UserError(f"the installation of {DISTRIBUTION} has no configurations; install its wheel")
    return {name: path.resolve() for name, path in sorted(named.items()) if "__pycache__" not in name}
