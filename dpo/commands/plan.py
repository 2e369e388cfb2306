"""dpo plan: prints what a training run will need, and loads no weights."""

import json
import shutil

from dpo import distributed, terminal
from dpo.commands.inputs import quieten_libraries
from dpo.config import Config
from dpo.loss.catalog import needs_mismatched, needs_whole_step
from dpo.planning.fit import Machine
from dpo.planning.plan import make_plan
from dpo.planning.text import as_json, page


def plan(
    config: Config,
    *,
    num_gpus: int,
    gpu_memory: int,
    gpu_flops: float,
    mfu: float | None,
    exact: bool,
    as_numbers: bool,
) -> None:
    """Prints what training will need: a page for people, or JSON with `as_numbers`."""
    quieten_libraries()
    distributed.start()
    machine = Machine(num_gpus=num_gpus, gpu_memory=gpu_memory, gpu_flops=gpu_flops, mfu=mfu)
    made = make_plan(
        config.model,
        config.data,
        config.reference,
        config.train,
        machine,
        exact=exact,
        whole_step=needs_whole_step(config.loss),
        mismatched=needs_mismatched(config.loss),
    )
    numbers = as_json(made)
    terminal.answer(
        "plan",
        json.dumps(numbers, indent=2)
        if as_numbers
        else page(made, shutil.get_terminal_size((110, 24)).columns),
        numbers,
    )
