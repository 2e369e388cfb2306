"""The errors that a person is meant to read.

Everything a person can get wrong (a file, an option, a folder, a model) is raised as `UserError`; the command
line prints its message without a traceback and exits with status 2. `StoppedBySignal` is status 3,
`RunFailed` is 1. Anything else is a bug of ours, with its traceback.
"""


class UserError(Exception):
    """Bad usage, configuration or data. The message says where, what, what was expected, and what to do."""


class StoppedBySignal(Exception):  # noqa: N818  (nothing went wrong)
    """SIGINT, SIGTERM or SIGUSR1, after what was done has been saved. The message says how to go on."""


class RunFailed(Exception):  # noqa: N818  (the run did, not this code)
    """A run cannot go on: a rank died or hangs, or the numbers are not finite. The message says which."""
