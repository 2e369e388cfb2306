"""`python -m dpo` and the installed command `dpo`."""

import os
import sys
import traceback

from dpo.cli.main import run
from dpo.processes import collect_from_here, end_with_launcher, put_off_collections

ALLOCATOR = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}
"""Where torch reads how a GPU's memory is managed. Our batches vary in width, and segments that cannot grow
would leave holes between them."""


def main() -> None:
    """Runs the command line and exits with its status.

    A launched rank exits without the interpreter's clean-up: threads of the process group may still hold
    tensors then, and releasing one aborts the process (pytorch/pytorch#190489) after a successful run.
    Everything that must be on disk is there when `run` returns.
    """
    end_with_launcher()
    put_off_collections()
    if not ALLOCATOR & os.environ.keys():  # before torch is loaded
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    status = 1
    try:
        status = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has gone, as in `dpo --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception:
        traceback.print_exc()
    finally:
        collect_from_here()
    if "WORLD_SIZE" not in os.environ:
        sys.exit(status)
    if status in (0, 3) and "torch" in sys.modules:  # done, or stopped by a signal: all ranks end alike
        from dpo import distributed

        distributed.leave()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
