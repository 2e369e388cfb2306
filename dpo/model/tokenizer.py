"""The tokenizer of a model: loaded without anything of the model itself, as `dpo check` needs it."""

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dpo.config import ModelConfig
from dpo.errors import UserError
from dpo.model.files import ask_hub, first_line, lacks, tokenizer_home


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with EOS as padding where it has none; padding is always masked.

    That of an adapter without one is its base's.

    Raises:
        UserError: There is no tokenizer, or it has no EOS token.
    """
    ask_hub(model.name_or_path)
    model = tokenizer_home(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model.name_or_path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise lacks(model.name_or_path, "tokenizer", first_line(error)) from error
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # made up by transformers
        raise UserError(
            f"model.name_or_path: no tokenizer in {model.name_or_path}; save one beside the model"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model.name_or_path: the tokenizer of {model.name_or_path} has no EOS token; set one and save it"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
