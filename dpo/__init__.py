"""Direct Preference Optimization (arXiv 2305.18290) with an offline reference cache.

The names in `__all__` are the Python interface; they are loaded when they are first used, so that the command
line starts without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpo.commands.api import Data as Data
    from dpo.commands.api import Experiment as Experiment
    from dpo.config import Config as Config
    from dpo.config import DataConfig as DataConfig
    from dpo.config import DataSource as DataSource
    from dpo.config import EvaluateConfig as EvaluateConfig
    from dpo.config import LoraConfig as LoraConfig
    from dpo.config import LossConfig as LossConfig
    from dpo.config import ModelConfig as ModelConfig
    from dpo.config import ReferenceConfig as ReferenceConfig
    from dpo.config import TrainConfig as TrainConfig
    from dpo.errors import UserError as UserError

__version__ = "0.1.0"

_HOMES = {
    "dpo.commands.api": ("Data", "Experiment"),
    "dpo.config": (
        "Config",
        "DataConfig",
        "DataSource",
        "EvaluateConfig",
        "LoraConfig",
        "LossConfig",
        "ModelConfig",
        "ReferenceConfig",
        "TrainConfig",
    ),
    "dpo.errors": ("UserError",),
}
"""Module -> the names of the interface that live there."""

__all__ = ["__version__", *sorted(name for names in _HOMES.values() for name in names)]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
