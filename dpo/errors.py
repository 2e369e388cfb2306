"""The errors that are meant for the user.

Everything a person can get wrong (a file, an option, a folder, a model) is raised as `UserError`; the command
line prints its message without a traceback and exits with status 2. `StoppedBySignal` is status 3,
`RunFailed` is 1. Anything else is a bug of ours and keeps its traceback.
"""


class UserError(Exception):
    """Bad usage, configuration or data. The message says where, what, what was expected, and what to do."""


class StoppedBySignal(Exception):  # noqa: N818  (nothing went wrong)
    """SIGINT, SIGTERM or SIGUSR1, after the work so far was saved. The message says how to continue."""


class RunFailed(Exception):  # noqa: N818  (the run did, not this code)
    """A run cannot continue: a rank died or hangs, or numbers are not finite. The message says which."""


class RunInUse(UserError):  # noqa: N818  (an answer)
    """Another process trains in the run folder: nothing may be written there, not even why this one ends."""
