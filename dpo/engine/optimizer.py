"""The optimizers, and the learning rate, which is a function of the optimizer step alone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from dpo.config import OptimizationConfig
from dpo.engine.deepspeed_config import offloads_optimizer
from dpo.engine.lion import Lion
from dpo.engine.muon import MuonWithAdamW
from dpo.errors import UserError

RMSPROP_SMOOTHING = 0.99
ZERO_HALF = ".lora_B."
"""In peft's names of the half of an adapter that starts at zero."""
RATIO = "learning_rate_ratio"
"""Key of a parameter group that has another learning rate than the run: by this factor."""
LION_BETAS = (0.9, 0.99)
"""The paper's default."""
FLOAT32 = 4
SMALLEST_IN_8_BITS, BLOCK_IN_8_BITS = 4096, 256
"""bitsandbytes keeps smaller weights in float32, and a float32 scale for each block of this many numbers."""
TYPICAL = torch.Size([4096, 4096])
Groups = list[dict[str, Any]]
"""Parameter groups in torch's format; `in_blocks` marks the matrices of the model's blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerKind:
    """What training, planning and the checks need to know of an optimizer."""

    make: Callable[[Groups, OptimizationConfig], torch.optim.Optimizer]
    state_bytes: Callable[[torch.Size, bool], int]
    """Bytes that it keeps for a weight of this shape, given whether it is a matrix of the model's blocks."""
    uses: frozenset[str] = frozenset()
    """Which of `ADAMS_OPTIONS` it reads."""
    not_sharded: str = ""
    """Why it cannot run on ZeRO's flat pieces of weights; empty: it updates every number by itself."""
    may_be_offloaded: bool = False
    """Whether DeepSpeed can run it on the host."""
    reshards: bool = False
    """Whether DeepSpeed can convert its state for another number of ranks."""
    package: str = ""
    """A package that it needs besides the project's own."""


ADAMS_OPTIONS = frozenset({"adam_betas", "adam_epsilon"})


def _adamw(groups: Groups, options: OptimizationConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, **_adams(options), fused=True)


def _rmsprop(groups: Groups, options: OptimizationConfig) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(groups, lr=options.learning_rate, alpha=RMSPROP_SMOOTHING)


def _adafactor(groups: Groups, options: OptimizationConfig) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    rate = options.learning_rate  # as it is: not scaled by the weights, and with our schedule
    made: torch.optim.Optimizer = Adafactor(groups, lr=rate, scale_parameter=False, relative_step=False)
    return made


def _lion(groups: Groups, options: OptimizationConfig) -> torch.optim.Optimizer:
    return Lion(groups, lr=options.learning_rate, betas=LION_BETAS)


def _muon(groups: Groups, options: OptimizationConfig) -> torch.optim.Optimizer:
    matrices = [group for group in groups if group["in_blocks"]]
    others = [group for group in groups if not group["in_blocks"]]
    return MuonWithAdamW(matrices, others, **_adams(options))


def _of_bitsandbytes(name: str) -> Callable[[Groups, OptimizationConfig], torch.optim.Optimizer]:
    def make(groups: Groups, options: OptimizationConfig) -> torch.optim.Optimizer:
        import bitsandbytes.optim

        made: torch.optim.Optimizer = getattr(bitsandbytes.optim, name)(groups, **_adams(options))
        return made

    return make


def _adams(options: OptimizationConfig) -> dict[str, Any]:
    return {"lr": options.learning_rate, "betas": options.adam_betas, "eps": options.adam_epsilon}


def _numbers(count: int) -> Callable[[torch.Size, bool], int]:
    """So many float32 numbers per parameter."""
    return lambda shape, in_blocks: FLOAT32 * count * shape.numel()


def _of_factors(shape: torch.Size, in_blocks: bool) -> int:
    """A mean for each row and column, of a vector for each number."""
    rows_and_columns = shape[:-1].numel() + (shape[:-2] + shape[-1:]).numel()
    return FLOAT32 * (rows_and_columns if len(shape) >= 2 else shape.numel())


def _of_muon(shape: torch.Size, in_blocks: bool) -> int:
    return FLOAT32 * shape.numel() * (1 if in_blocks else 2)


def _in_8_bits(shape: torch.Size, in_blocks: bool) -> int:
    if shape.numel() < SMALLEST_IN_8_BITS:
        return 2 * FLOAT32 * shape.numel()
    return 2 * (shape.numel() + FLOAT32 * -(-shape.numel() // BLOCK_IN_8_BITS))


_IN_BLOCKS_OF_8_BITS = f"rounds its state in blocks of {BLOCK_IN_8_BITS} numbers of a weight"

OPTIMIZERS = {
    "adamw": OptimizerKind(
        make=_adamw, state_bytes=_numbers(2), uses=ADAMS_OPTIONS, may_be_offloaded=True, reshards=True
    ),
    "rmsprop": OptimizerKind(make=_rmsprop, state_bytes=_numbers(1)),
    "lion": OptimizerKind(make=_lion, state_bytes=_numbers(1)),
    "adafactor": OptimizerKind(
        make=_adafactor,
        state_bytes=_of_factors,
        not_sharded="keeps means of the rows and columns of whole matrices",
    ),
    "muon": OptimizerKind(
        make=_muon,
        state_bytes=_of_muon,
        uses=ADAMS_OPTIONS,
        not_sharded="orthogonalizes the updates of whole matrices",
    ),
    "adamw_8bit": OptimizerKind(
        make=_of_bitsandbytes("AdamW8bit"),
        state_bytes=_in_8_bits,
        uses=ADAMS_OPTIONS,
        not_sharded=_IN_BLOCKS_OF_8_BITS,
        package="bitsandbytes",
    ),
    "paged_adamw": OptimizerKind(
        make=_of_bitsandbytes("PagedAdamW"),
        state_bytes=_numbers(2),
        uses=ADAMS_OPTIONS,
        not_sharded="pages its state itself, and DeepSpeed would load it into the GPU's own memory",
        package="bitsandbytes",
    ),
    "paged_adamw_8bit": OptimizerKind(
        make=_of_bitsandbytes("PagedAdamW8bit"),
        state_bytes=_in_8_bits,
        uses=ADAMS_OPTIONS,
        not_sharded=_IN_BLOCKS_OF_8_BITS,
        package="bitsandbytes",
    ),
}
"""Name -> kind, for every value of `train.optimizer`."""


def make_optimizer(
    module: nn.Module,
    options: OptimizationConfig,
    *,
    zero_half_ratio: float = 1.0,
    updated: Mapping[nn.Parameter, nn.Parameter] | None = None,
) -> torch.optim.Optimizer:
    """The configured optimizer over the parameters that need a gradient; weight decay on matrices only.

    Args:
        module: What is trained.
        options: The optimizer.
        zero_half_ratio: Learning rate of the halves of adapters that start at zero, over that of the rest.
        updated: Weight -> what is updated in its place; others are left alone. None: the weights.
    """
    in_blocks = _matrices_of_blocks(module) if options.optimizer == "muon" else set()
    decay = options.weight_decay
    groups: Groups = [
        {"params": [], "weight_decay": decay, "in_blocks": True},
        {"params": [], "weight_decay": decay, "in_blocks": False},
        {"params": [], "weight_decay": 0.0, "in_blocks": False},
        {"params": [], "weight_decay": decay, "in_blocks": True, RATIO: zero_half_ratio},
        {"params": [], "weight_decay": decay, "in_blocks": False, RATIO: zero_half_ratio},
    ]
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and (updated is None or parameter in updated):
            kind = 0 if parameter in in_blocks else 1 if len(_shape(parameter)) >= 2 else 2
            kind += 3 if zero_half_ratio != 1 and ZERO_HALF in name else 0  # always a matrix
            groups[kind]["params"].append(parameter if updated is None else updated[parameter])
    return OPTIMIZERS[options.optimizer].make([group for group in groups if group["params"]], options)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of every parameter group for the next update."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(RATIO, 1.0)


def state_bytes(module: nn.Module, optimizer: str) -> int:
    """Bytes of the optimizer's state of all parameters that need a gradient.

    Args:
        module: On any device, also the meta device.
        optimizer: A name of `OPTIMIZERS`.
    """
    of_weight, in_blocks = OPTIMIZERS[optimizer].state_bytes, _matrices_of_blocks(module)
    trained = (parameter for parameter in module.parameters() if parameter.requires_grad)
    return sum(of_weight(_shape(parameter), parameter in in_blocks) for parameter in trained)


def load_state(optimizer: AcceleratedOptimizer, state: dict[str, Any]) -> None:
    """Loads what `state_dict` gave, without DeepSpeed.

    A paged state stays in memory that the driver pages: bitsandbytes would load it into the GPU's own.
    """
    own = optimizer.optimizer
    if not getattr(own, "is_paged", False):
        optimizer.load_state_dict(state)
        return
    own.load_state_dict(state, move_to_device=False)
    for parameter, found in own.state.items():
        for name in ("state1", "state2"):
            paged = own.get_state_buffer(parameter, dtype=found[name].dtype)
            found[name] = paged.copy_(found[name])


def typical_state_bytes(optimizer: str) -> float:
    """Bytes per parameter of a large matrix of a block, for where no model is at hand."""
    return OPTIMIZERS[optimizer].state_bytes(TYPICAL, True) / TYPICAL.numel()


def _matrices_of_blocks(module: nn.Module) -> set[nn.Parameter]:
    """Matrices of the repeated blocks: not of the embedding or the output layer, and not stacked experts."""
    blocks = (child for child in module.modules() if isinstance(child, nn.ModuleList))
    return {weight for block in blocks for weight in block.parameters() if len(_shape(weight)) == 2}


def _shape(parameter: nn.Parameter) -> torch.Size:
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def check_optimizer(options: OptimizationConfig, deepspeed: dict[str, Any] | None) -> None:
    """Refuses an optimizer that cannot run here, and options that it does not use.

    Args:
        options: The optimizer.
        deepspeed: DeepSpeed's configuration, or None without DeepSpeed.

    Raises:
        UserError: What is wrong, and what to set instead.
    """
    name, kind, plain = options.optimizer, OPTIMIZERS[options.optimizer], type(options)()
    for option in sorted(ADAMS_OPTIONS - kind.uses):
        if (value := getattr(options, option)) != getattr(plain, option):
            raise UserError(f"train.{option}: {value}; {name} does not use it: leave it out")
    if kind.package and find_spec(kind.package) is None:
        raise UserError(
            f"train.optimizer: {name}; it needs {kind.package}, which is not installed: pip install "
            f"{kind.package}, or set another optimizer"
        )
    if deepspeed is None:
        return
    stage = deepspeed["zero_optimization"].get("stage", 0)
    if offloads_optimizer(deepspeed) and not kind.may_be_offloaded:  # Accelerate would use another one
        raise UserError(
            f"train.optimizer: {name}; DeepSpeed cannot run it on the host: set adamw, or use a DeepSpeed "
            "configuration without offload_optimizer"
        )
    if kind.not_sharded:
        raise UserError(
            f"train.optimizer: {name}; it {kind.not_sharded}, so DeepSpeed ZeRO-{stage} cannot take it: "
            "train without DeepSpeed (launch/one_process.yaml, launch/one_node_ddp.yaml), or set adamw, "
            "rmsprop or lion"
        )
