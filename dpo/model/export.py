"""The finished model as others load it: safetensors, tokenizer, generation config and a model card.

Training ends here. The folder appears complete or not at all, and all of its files have the permissions of
the umask, the weights too.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo.files import atomic_folder
from dpo.model.authors import authors_settings

CARD = "README.md"


def export_model(
    model: PreTrainedModel,
    weights: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    card: str,
) -> None:
    """Writes a folder that `AutoModelForCausalLM.from_pretrained` loads.

    Args:
        model: The bare model; its config is saved as its author set it, and it says which weights are tied.
        weights: Its full state dict on the CPU.
        tokenizer: The tokenizer it was trained with.
        folder: The final place; replaced if it exists. May be a link to a folder elsewhere.
        card: The model card, Markdown.
    """
    tied = getattr(model, "all_tied_weights_keys", {})  # copies in another dtype no longer share memory
    untied = {name: weight for name, weight in weights.items() if tied.get(name) not in weights}
    _make_generation_config_valid(model)
    with exported_folder(tokenizer, folder, card) as building, authors_settings(model):
        model.save_pretrained(building, state_dict=untied)


@contextmanager
def exported_folder(tokenizer: PreTrainedTokenizerBase, folder: Path, card: str) -> Iterator[Path]:
    """A folder to write weights to; at the end of the block it gets tokenizer and card and takes its place.

    Args:
        tokenizer: The tokenizer of the model.
        folder: The final place; replaced if it exists. After an error it is as it was.
        card: The model card, Markdown.
    """
    with atomic_folder(folder) as building:
        yield building
        tokenizer.save_pretrained(building)
        (building / CARD).write_text(card, encoding="utf-8")
        _follow_umask(building)


def _follow_umask(folder: Path) -> None:
    """Gives all files the permissions of one that was made plainly: safetensors makes its own 0600."""
    mode = (folder / CARD).stat().st_mode & 0o777
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _make_generation_config_valid(model: PreTrainedModel) -> None:
    """Turns sampling on where a base model has a temperature or top-p without it: transformers would not save
    that.
    """
    settings = model.generation_config
    if settings is None:
        return
    try:
        settings.validate(strict=True)
    except ValueError:
        settings.do_sample = True
