"""The finished model as others load it: safetensors, tokenizer, generation config and a model card."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def export_model(
    model: PreTrainedModel,
    weights: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    card: str,
) -> None:
    """Writes a folder that `AutoModelForCausalLM.from_pretrained` loads; complete or not there at all.

    Args:
        model: The bare model, for its config and for which weights are tied.
        weights: Its full state dict on the CPU.
        tokenizer: The tokenizer it was trained with.
        folder: Where; replaced if it exists.
        card: The model card, Markdown.
    """
    tied = getattr(model, "all_tied_weights_keys", {})  # a cast copy of one is not seen as shared any more
    model.config.use_cache = True  # off during training only
    _mend_generation_config(model)
    with complete_folder(folder) as building:
        model.save_pretrained(
            building,
            state_dict={name: weight for name, weight in weights.items() if tied.get(name) not in weights},
        )
        model.config.use_cache = False
        tokenizer.save_pretrained(building)
        (building / "README.md").write_text(card)


@contextmanager
def complete_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder` that takes its place at the end of the block; not after an error."""
    building = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    yield building
    shutil.rmtree(folder, ignore_errors=True)
    building.rename(folder)


def _mend_generation_config(model: PreTrainedModel) -> None:
    """Lets a base model's temperature or top-p without do_sample be saved; transformers refuses to."""
    settings = model.generation_config
    if settings is None:
        return
    try:
        settings.validate(strict=True)
    except ValueError:
        settings.do_sample = True
