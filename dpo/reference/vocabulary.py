"""Whether a reference model reads token ids as the policy does, whose ids it scores."""

from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from dpo.config import ModelConfig, ReferenceConfig
from dpo.data.tokenize import tokenizer_digest
from dpo.errors import UserError
from dpo.model.tokenizer import load_tokenizer

SHOWN = 3


def check_vocabulary(model: ModelConfig, reference: ReferenceConfig) -> list[str]:
    """Compares the tokenizers of the policy and of `reference.model`; nothing to do where none is named.

    A chat template may differ, and either may have further tokens: the ids of the data count.

    Returns:
        What a person should know, in lines; empty where the tokenizers agree.

    Raises:
        UserError: An id stands for another token in the reference.
    """
    if reference.model is None:
        return []
    policy = load_tokenizer(model)
    try:
        other = load_tokenizer(replace(model, name_or_path=reference.model, revision=None))
    except UserError:
        return [
            f"reference.model: {reference.model} has no tokenizer that can be loaded; whether it reads token "
            f"ids as {model.name_or_path} does was not checked"
        ]
    same = tokenizer_digest(policy) == tokenizer_digest(other)
    if not same and (found := differences(policy, other)):
        shown = "; ".join(found[:SHOWN]) + ("; ..." if len(found) > SHOWN else "")
        raise UserError(
            f"reference.model: {reference.model} has another tokenizer than {model.name_or_path}: "
            f"{len(found)} tokens differ ({shown}), so it would score other text; expected a model with the "
            "same vocabulary"
        )
    return []


def differences(policy: PreTrainedTokenizerBase, reference: PreTrainedTokenizerBase) -> list[str]:
    """Tokens with another id, and ids with another token, in lines for people.

    A token that was added to a vocabulary may be renamed: models have reserved ones for that.
    """
    mine, theirs = policy.get_vocab(), reference.get_vocab()
    added = {*policy.added_tokens_decoder, *reference.added_tokens_decoder}
    names = {number: token for token, number in theirs.items()}
    found = []
    for token, number in sorted(mine.items(), key=lambda entry: entry[1]):
        if theirs.get(token, number) != number:
            found.append(f"{token!r} is {number} in the policy and {theirs[token]} in the reference")
        elif number not in added and names.get(number, token) != token:
            found.append(f"{number} is {token!r} in the policy and {names[number]!r} in the reference")
    return found
