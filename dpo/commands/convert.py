"""`dpo convert`: a configuration of TRL's DPO trainer, or of the alignment-handbook, as one of ours.

The rules are in `dpo.convert`; here a file is read, written, and every key accounted for.
"""

from pathlib import Path
from typing import Any

import yaml

from dpo import terminal
from dpo.convert.lines import Became, Line
from dpo.convert.rules import convert
from dpo.errors import UserError
from dpo.files import write_file

SECTIONS = ("run_dir", "model", "data", "reference", "loss", "train")


def convert_file(source: Path, num_gpus: int, output: Path) -> None:
    """Writes our configuration and shows what became of every key of theirs.

    Args:
        source: Their YAML file.
        num_gpus: On how many GPUs that run was: its batch size counts on each.
        output: Where ours goes.

    Raises:
        UserError: The file is not a mapping of theirs, or the output is there already.
    """
    if output.exists():
        raise UserError(f"--output: {output} is there already; choose another name, or delete it")
    lines = convert(_read(source), num_gpus)
    settings = nested(lines)
    head = f"# From {source.name}, a run on {num_gpus} GPU(s); dpo convert showed what is not mapped.\n"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_file(output, head + yaml.safe_dump(settings, sort_keys=False, width=100))
    lacking = [
        f"{section}.{key}"
        for section, key in (("model", "name_or_path"), ("data", "train"))
        if key not in settings.get(section, {})
    ]
    rows = {
        kind.value: "\n".join(map(str, (line for line in lines if line.became is kind))) for kind in Became
    }
    todo = {"fill in": f"{', '.join(lacking)}: the file does not say"} if lacking else {}
    terminal.summary("convert", rows | todo | {"file": str(output), "next": f"dpo check --config {output}"})


def nested(lines: list[Line]) -> dict[str, Any]:
    """Our configuration as config.yaml has it: sections, and in them the keys that were mapped."""
    settings: dict[str, Any] = {name: {} for name in SECTIONS}
    for key, value in (entry for line in lines for entry in line.ours.items()):
        *sections, name = key.split(".")
        place = settings
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return {name: value for name, value in settings.items() if value != {}}


def _read(source: Path) -> dict[str, Any]:
    try:
        given = yaml.safe_load(source.read_text())
    except OSError as error:
        raise UserError(f"{source}: {error.strerror}; expected a YAML file of TRL's") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(given, dict):
        raise UserError(f"{source}: expected keys and values, got {type(given).__name__}")
    if ours := [name for name in ("model", "data", "loss", "train") if isinstance(given.get(name), dict)]:
        raise UserError(f"{source}: has a section {ours[0]}, as our own files have; expected a file of TRL's")
    return {str(key): _number(value) for key, value in given.items()}


def _number(value: Any) -> Any:
    """YAML 1.1 reads 5e-7 as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
