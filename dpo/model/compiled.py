"""`model.compile`: each of a model's repeated blocks compiled by torch: elementwise work in few kernels.

Blocks of one kind share their code, which serves batches of all shapes. Attention over trees stays what it
is. A model as its authors wrote it, and generation with a key-value cache, run without.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from transformers import Cache, PreTrainedModel

from dpo.errors import UserError
from dpo.model.routers import Routers

BACKEND = "inductor"


def compile_blocks(model: PreTrainedModel) -> None:
    """Compiles the blocks of a model, its first list of modules; each at its first call.

    Args:
        model: Changed in place; its weights and names stay what they are. If activations are recomputed, it
            is set up for that already.

    Raises:
        UserError: On a CPU without a C++ compiler, or for routed experts.
    """
    if Routers(model).num_experts:
        raise UserError(
            "model.compile: true; the shapes of routed experts follow the tokens, and what they choose is "
            "recorded: leave it out"
        )
    if not torch.cuda.is_available():
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise UserError(
                "model.compile: true; torch found no C++ compiler: install g++, or leave it out"
            ) from error
    blocks: Any = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    for block in blocks:
        if getattr(block, "gradient_checkpointing", False):
            block._gradient_checkpointing_func = _Recomputed(block._gradient_checkpointing_func)
        else:  # what Module.compile would set, for calls without a cache
            block._compiled_call_impl = _Call(block)


def eagerly() -> AbstractContextManager[Any]:
    """Within the block nothing compiled runs."""
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


class _Call:
    """A block's call: compiled where activations flow, as it is where a cache grows."""

    def __init__(self, block: nn.Module) -> None:
        self._plain: Callable[..., Any] = block._call_impl
        self._compiled = _compile(self._plain)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cached = any(isinstance(value, Cache) for value in (*args, *kwargs.values()))
        return self._plain(*args, **kwargs) if cached else self._compiled(*args, **kwargs)


class _Recomputed:
    """A block's checkpoint, with the block compiled inside of it: around it, the graph could not break."""

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self._checkpoint = checkpoint
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, forward: partial[Any], *args: Any) -> Any:
        self._compiled = self._compiled or _compile(forward.func)
        return self._checkpoint(partial(self._compiled, *forward.args, **forward.keywords), *args)


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(function, dynamic=True, backend=BACKEND)
    return compiled
