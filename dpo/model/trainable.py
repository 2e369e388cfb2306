"""Whether a model can be trained, as far as its JSON files say.

`dpo check` runs before every stage: importing transformers' classes of models would take half of its time.
"""

from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dpo.config import ModelConfig
from dpo.errors import UserError
from dpo.model.files import adapter_files, base_of, raw_config


def is_plain(model: ModelConfig) -> bool:
    """Whether this module checks all that `lora.check_policy` does, of a model on this machine.

    That is so where all weights are trained, none of them is quantized, and no routers are balanced.
    """
    if model.lora is not None or model.quantization is not None or model.router_aux_loss_weight:
        return False
    folder = Path(model.name_or_path) if model.name_or_path else None
    return folder is None or not folder.is_dir() or "quantization_config" not in raw_config(base_of(model))


def refuse_adapter(model: ModelConfig) -> None:
    """Raises UserError if the model is an adapter, and nothing says what is to be done with it."""
    if (model.lora is None or model.lora.start == "new") and adapter_files(model):
        raise UserError(
            f"model.name_or_path: {model.name_or_path} is an adapter: set model.lora.start to continue, "
            "which trains it on, or to merge, which adds it to its base and trains a new one"
        )


def check_family(model: ModelConfig) -> None:
    """Raises UserError if transformers has no causal language model of this family."""
    raw = raw_config(base_of(model))
    family = raw.get("model_type")
    if "auto_map" not in raw and family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(
            f"model.name_or_path: {model.name_or_path} is a {family}, of which transformers has no causal "
            "language model; expected a decoder such as llama, qwen3 or gpt2"
        )
