"""`model.compile`: each of a model's repeated blocks compiled by torch: elementwise work in few kernels.

Blocks of one kind share their code, which serves batches of all shapes. Attention over trees stays what it
is. A model as its authors wrote it, and generation with a key-value cache, run without.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from transformers import Cache, PreTrainedModel

from dpo.errors import UserError

BACKEND = "inductor"


def compile_blocks(model: PreTrainedModel) -> None:
    """Compiles the blocks of a model, its first list of modules; each at its first call.

    Args:
        model: Changed in place; its weights and names stay what they are.

    Raises:
        UserError: On a CPU without a C++ compiler.
    """
    if not torch.cuda.is_available():
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise UserError(
                "model.compile: true; torch found no C++ compiler: install g++, or leave it out"
            ) from error
    for block in next(module for module in model.modules() if isinstance(module, nn.ModuleList)):
        # what Module.compile would set, for calls without a cache
        block._compiled_call_impl = _Call(block)


def eagerly() -> AbstractContextManager[Any]:
    """Within the block nothing compiled runs."""
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


class _Call:
    """A block's call: compiled where activations flow, as it is where a cache grows."""

    def __init__(self, block: nn.Module) -> None:
        self._plain: Callable[..., Any] = block._call_impl
        self._compiled: Callable[..., Any] = torch.compile(self._plain, dynamic=True, backend=BACKEND)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cached = any(isinstance(value, Cache) for value in (*args, *kwargs.values()))
        return self._plain(*args, **kwargs) if cached else self._compiled(*args, **kwargs)
