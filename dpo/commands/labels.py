"""Whether data with labels, instead of pairs, is such as a loss needs."""

from dpo.config import LossConfig
from dpo.data.dataset import TokenizedDataset
from dpo.data.records import NO_RIVAL
from dpo.errors import UserError
from dpo.loss.catalog import LOSSES, names_of, takes_labels


def check_labels(loss: LossConfig, train: TokenizedDataset, test: TokenizedDataset | None) -> None:
    """Raises UserError where data has labels and the loss needs pairs, or all labels are the same."""
    for key, data in (("data.train", train), ("data.test", test)):
        if data is None or data.has_rivals.all():
            continue
        refuse_labels(loss, key, data.contents)
        for place, label in ((1, "true"), (0, "false")):
            if (data.pairs[:, place] == NO_RIVAL).all():
                raise UserError(
                    f"{key}: all {len(data.pairs)} labels are {label}; expected desirable and undesirable "
                    "completions: add rows of the other label"
                )


def refuse_labels(loss: LossConfig, key: str, contents: str) -> None:
    """Raises UserError where the loss, or an option of it, needs pairs.

    Args:
        loss: With its options.
        key: The option that names the data.
        contents: What the data has, for the message.
    """
    if not takes_labels(loss):
        fitting = ", ".join(name for name, kind in LOSSES.items() if kind.takes_labels)
        raise UserError(
            f"loss.type: {', '.join(names_of(loss))}; it needs pairs, and {key} has {contents}: use one of "
            f"{fitting}, or rows of chosen and rejected"
        )
    for name in ("ld_alpha", "pair_weights"):
        if (value := getattr(loss, name)) != getattr(LossConfig(), name):
            raise UserError(f"loss.{name}: {value}; it needs pairs, and {key} has {contents}: leave it out")
