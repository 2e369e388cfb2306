"""Functions of the user's own, which a configuration names as python:module.function."""

import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from dpo.errors import UserError

PREFIX = "python:"


def find_function(path: str, place: str) -> Callable[..., Any]:
    """The function that `module.function` names; the current folder is searched first.

    Args:
        path: Its module and name.
        place: The option that names it, for messages.

    Raises:
        UserError: There is no such module or function.
    """
    module, _, name = path.rpartition(".")
    if os.getcwd() not in sys.path:  # noqa: PTH109  # the installed command does not search it
        sys.path.insert(0, os.getcwd())  # noqa: PTH109
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{place}: {error}; expected module.function, importable from this folder") from error
    if not callable(found):
        raise UserError(f"{place}: {path} is a {type(found).__name__}; expected a function")
    function: Callable[..., Any] = found
    return function
