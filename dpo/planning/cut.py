"""A model cut to a few of its blocks, so that a step of any depth is rehearsed in seconds.

Blocks of one kind have weights of the same shapes and the same type of layer; a model may mix dense blocks
with experts, and attention with recurrences. One block of each kind, and one more of a kind, tell what each
kind keeps.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from torch import nn
from transformers import PreTrainedModel

RECURRENT = ("linear", "mamba", "conv", "recurrent", "hybrid", "ssm")
"""Words in the types of layers whose state would leak from one segment of a row to the next."""


class Blocks:
    """The repeated blocks of a model, which is never changed."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Finds the blocks: the model's first list of modules.

        Args:
            model: On the meta device.

        Raises:
            ValueError: There is no such list.
        """
        self._model = model
        for parent in model.modules():
            for name, child in parent.named_children():
                if isinstance(child, nn.ModuleList) and len(child):
                    self._parent, self._name, self._blocks = parent, name, child
                    self.kinds = _kinds(child, _types(model))
                    """Numbers of the blocks of each kind, in the order of their first blocks."""
                    return
        raise ValueError(f"{type(model).__name__}: expected blocks in a ModuleList")

    @property
    def name(self) -> str:
        """Class of the model."""
        return type(self._model).__name__

    @property
    def recur(self) -> bool:
        """Whether layers have a state that runs along a row, by the types that the config names."""
        return any(word in str(kind) for kind in _types(self._model) for word in RECURRENT)

    @property
    def last(self) -> int:
        """Index of the last block's kind."""
        return next(n for n, kind in enumerate(self.kinds) if len(self._blocks) - 1 in kind)

    def keeping(self, numbers: Sequence[int]) -> PreTrainedModel:
        """A copy of the model with these blocks only, in this order."""
        setattr(self._parent, self._name, nn.ModuleList([self._blocks[number] for number in numbers]))
        try:
            copy = deepcopy(self._model)
        finally:
            setattr(self._parent, self._name, self._blocks)
        text = copy.config.get_text_config()
        for key, value in list(vars(text).items()):
            if isinstance(value, list) and len(value) == len(self._blocks):
                vars(text)[key] = [value[number] for number in numbers]
        return copy


def _types(model: PreTrainedModel) -> list[Any]:
    """The type of each layer, where the config has them."""
    return list(getattr(model.config.get_text_config(), "layer_types", None) or [])


def _kinds(blocks: nn.ModuleList, types: Sequence[Any]) -> list[list[int]]:
    found: dict[Any, list[int]] = {}
    for number, block in enumerate(blocks):
        shapes = tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())
        found.setdefault((shapes, *types[number : number + 1]), []).append(number)
    return list(found.values())
