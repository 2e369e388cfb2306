"""What resuming compares: the whole configuration, which only commands know."""

import json
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_type_hints

from dpo.config import Config, SftConfig, flat, resolved
from dpo.train.resume import Settings


def settings_of(config: Config | SftConfig) -> Settings:
    """The resolved configuration with the defaults of its keys, as resuming compares it."""
    return Settings(resolved(config), flat(_defaults(type(config))))


def _defaults(kind: type) -> dict[str, Any]:
    """Name -> default of a configuration class, nested; without keys that have none."""
    found: dict[str, Any] = {}
    hints = get_type_hints(kind)
    for option in fields(kind):
        if is_dataclass(hints[option.name]):
            found[option.name] = _defaults(hints[option.name])
        elif option.default is not MISSING:
            found[option.name] = option.default
        elif option.default_factory is not MISSING:
            found[option.name] = option.default_factory()
    return dict(json.loads(json.dumps(found)))
