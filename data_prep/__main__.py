"""`python -m data_prep`."""

import os
import sys
import traceback

from data_prep.cli import main


def run() -> None:
    """Runs the command line and exits with its status; a launched rank without the interpreter's clean-up.

    As `dpo.__main__`: threads of the process group may abort a rank there (pytorch/pytorch#190489), and its
    launcher would then end the one that writes the files.
    """
    status = 1
    try:
        status = main()
    except Exception:
        traceback.print_exc()
    if "WORLD_SIZE" not in os.environ:
        sys.exit(status)
    if status == 0 and "torch" in sys.modules:
        from dpo import distributed

        distributed.leave()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    run()
