"""dpo plan."""

import json

from dpo.commands.inputs import join_ranks
from dpo.config import Config
from dpo.planning.fit import Machine
from dpo.planning.plan import as_json, make_plan
from dpo.planning.text import page


def plan(
    config: Config,
    *,
    num_gpus: int,
    gpu_memory: int,
    gpu_flops: float,
    mfu: float,
    exact: bool,
    as_numbers: bool,
) -> None:
    """Prints what training will need: for people, or with `as_numbers` as JSON."""
    join_ranks()
    machine = Machine(num_gpus=num_gpus, gpu_memory=gpu_memory, gpu_flops=gpu_flops, mfu=mfu)
    made = make_plan(config, machine, exact=exact)
    print(json.dumps(as_json(made), indent=2) if as_numbers else page(made))
