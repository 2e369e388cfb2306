"""Which layers an adapter of `model.lora` reaches, and which it may not."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dpo.config import LoraConfig, ModelConfig
from dpo.errors import UserError
from dpo.model.files import base_of

PARTS_OF_EXPERTS = ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3")


def new_options(model: PreTrainedModel, config: ModelConfig) -> Any:
    """Peft's options of a new adapter; dropout is off (law 0).

    Args:
        model: The base.
        config: The base's name and the adapter's options.
    """
    from peft import LoraConfig as PeftOptions

    lora, name = config.lora, base_of(config).name_or_path
    assert lora is not None
    return PeftOptions(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft divides it by the rank without rounding
        use_rslora=lora.rank_stabilized,
        use_dora=lora.dora,
        target_modules=_all_linear(model) if lora.target_modules == "all-linear" else lora.target_modules,
        target_parameters=lora.target_parameters or None,
        modules_to_save=lora.modules_to_save or None,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        base_model_name_or_path=str(Path(name).resolve()) if Path(name).is_dir() else name,
    )


def _all_linear(model: PreTrainedModel) -> list[str]:
    """Names of every linear layer but the output layer: their last parts, unless other modules share them."""
    head = model.get_output_embeddings()
    linear = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    others = {name.rpartition(".")[2] for name, _ in model.named_modules() if name not in linear}
    last = {name: name.rpartition(".")[2] for name in linear}
    if _num_stacked(model):  # peft takes these names for parts of the experts
        last = {name: end for name, end in last.items() if end not in PARTS_OF_EXPERTS}
    return sorted({name if end in others or end.isdigit() else end for name, end in last.items()})


def _num_stacked(model: PreTrainedModel) -> int:
    """Number of weights of experts that are one tensor per block."""
    shapes = [getattr(p, "ds_shape", p.shape) for p in model.parameters()]
    return sum(math.prod(shape) for shape in shapes if len(shape) == 3 and shape[1] > 1)


def left_out(model: PreTrainedModel) -> str | None:
    """What an adapter of all linear layers does not reach, for people; None where that is nothing."""
    experts = _num_stacked(model)
    if not experts:
        return None
    whole = sum(math.prod(getattr(p, "ds_shape", p.shape)) for p in model.parameters())
    return (
        "model.lora: all-linear leaves out the experts, which are one tensor per block, and layers whose "
        f"names they share: the experts' {experts / whole:.0%} of the weights stay as they are"
    )


def refuse_other_layers(model: PreTrainedModel, lora: LoraConfig) -> None:
    """Refuses what the scoring function reads without its layer, and names that fit nothing.

    That is the output layer, whose weights are read directly, and embeddings, which may be tied to it.

    Args:
        model: With the adapter.
        lora: What was asked for.

    Raises:
        UserError: Such a layer has an adapter, or a name that was given has none.
    """
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    head, tied = model.get_output_embeddings(), getattr(model, "all_tied_weights_keys", {})
    linear, parameters, whole = list[str](), list[str](), list[str]()
    for name, module in model.named_modules():
        plain = name.replace(".base_layer", "")
        if isinstance(module, ModulesToSaveWrapper):
            whole.append(name)
            names = {f"{name}.{part}" for part, _ in module.original_module.named_parameters()}
            if names & {*tied.keys(), *tied.values()}:
                raise _cannot_save(lora, f"{name} is tied to another layer")
        elif isinstance(module, ParamWrapper):
            parameters.append(f"{plain}.{module.parameter_name}")
            if module.num_experts == 1:
                raise cannot_stack(lora, f"{parameters[-1]} is not a stack of experts")
        elif isinstance(module, BaseTunerLayer):
            linear.append(name)
            if module is head:
                raise cannot_adapt(lora, f"{name} is the output layer")
            if not isinstance(module.get_base_layer(), nn.Linear | Conv1D):
                raise cannot_adapt(lora, f"{name} is a {type(module.get_base_layer()).__name__}")
    if isinstance(lora.target_modules, list) and (lost := _unmatched(lora.target_modules, linear)):
        raise cannot_adapt(lora, f"{lost} is no layer of the model")
    if lost := _unmatched(lora.target_parameters, parameters):
        raise cannot_stack(lora, f"{lost} is no weight of the model")
    if lost := _unmatched(lora.modules_to_save, whole):
        raise _cannot_save(lora, f"{lost} is no module of the model")


def _unmatched(wanted: Sequence[str], found: Sequence[str]) -> str | None:
    """The first wanted name that is neither one that was found nor the end of one, as peft matches them."""
    return next(
        (name for name in wanted if not any(f".{other}".endswith(f".{name}") for other in found)), None
    )


def cannot_adapt(lora: LoraConfig, reason: str) -> UserError:
    """The error for layers that are not there, or that cannot have an adapter."""
    short = reason if len(reason) <= 200 else f"{reason[:200]} ..."
    return UserError(
        f"model.lora.target_modules: {lora.target_modules}; {short}: expected all-linear, or names of linear "
        "layers inside the model's blocks, such as q_proj"
    )


def cannot_stack(lora: LoraConfig, reason: str) -> UserError:
    """The error for weights that are no stack of experts."""
    return UserError(
        f"model.lora.target_parameters: {lora.target_parameters}; {reason}: expected weights of experts, "
        "which are one tensor per block, such as mlp.experts.down_proj"
    )


def _cannot_save(lora: LoraConfig, reason: str) -> UserError:
    return UserError(
        f"model.lora.modules_to_save: {lora.modules_to_save}; {reason}: expected names of modules with "
        "weights of their own, such as norm"
    )
