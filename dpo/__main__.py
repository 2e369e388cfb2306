"""`python -m dpo` and the installed command `dpo`."""

import os
import sys
import traceback

from dpo.cli.main import run


def main() -> None:
    """Runs the command line and exits with its status.

    A rank of a launcher leaves without the interpreter's own clean-up: the process group's threads may still
    hold tensors then, and to release one aborts the process (pytorch/pytorch#190489), after a run that was
    fine. Everything that must be on disk is there when `run` returns.
    """
    status = 1
    try:
        status = run(sys.argv[1:])
    except Exception:
        traceback.print_exc()
    if "WORLD_SIZE" not in os.environ:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
