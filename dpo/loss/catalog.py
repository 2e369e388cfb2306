"""Which losses there are, what each needs and which options it uses: the table that everything else reads.

It imports no tensors, so that a configuration is checked without torch. The functions of the same names are
in `dpo.loss.functions`; `dpo.loss.preference_loss` combines them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

from dpo.config import LossConfig
from dpo.config.foreign import meant
from dpo.config.own import PREFIX, find_function
from dpo.errors import UserError

SMOOTHED = frozenset({"beta", "label_smoothing"})
DIVERGENCE = frozenset({"f_divergence", "f_alpha"})


@dataclass(frozen=True, slots=True, kw_only=True)
class LossKind:
    """What a loss needs."""

    uses: frozenset[str] = frozenset({"beta"})
    """Options of `LossConfig` that it reads, besides those of `ANY_LOSS`."""
    needs_reference: bool = True
    """Whether it compares policy and reference, so that training needs the cache."""
    averaged_over: str = "pairs"
    """pairs: its mean is over pairs; groups: over groups, each a ranking of its completions."""
    per_token: bool = False
    """Whether it divides log-probs by the completion's length; `ld_alpha` then makes no sense."""
    whole_step: bool = False
    """Whether its value depends on all pairs of the optimizer step together, over all ranks."""
    running: bool = False
    """Whether its value depends on sums over all steps before."""
    takes_labels: bool = False
    """Whether each completion adds to it by itself, so that data with labels instead of pairs will do."""
    mismatched: bool = False
    """Whether it needs log-probs of completions of other prompts."""
    quantiles: bool = False
    """Whether it needs the quantiles of the completions' scores among those of the reference."""


LOSSES = {
    "sigmoid": LossKind(uses=SMOOTHED | DIVERGENCE),
    "robust": LossKind(uses=SMOOTHED | DIVERGENCE),
    "exo_pair": LossKind(uses=SMOOTHED | DIVERGENCE),
    "ipo": LossKind(uses=frozenset({"beta"}) | DIVERGENCE),
    "hinge": LossKind(uses=frozenset({"beta"}) | DIVERGENCE),
    "nca_pair": LossKind(takes_labels=True),
    "sppo_hard": LossKind(),
    "apo_zero": LossKind(takes_labels=True),
    "apo_down": LossKind(),
    "discopop": LossKind(uses=frozenset({"beta", "discopop_tau"}) | DIVERGENCE),
    "sigmoid_norm": LossKind(uses=SMOOTHED, per_token=True),
    "ipo_norm": LossKind(per_token=True),
    "aot": LossKind(uses=SMOOTHED, whole_step=True),
    "aot_unpaired": LossKind(uses=SMOOTHED, whole_step=True),
    "plackett_luce": LossKind(averaged_over="groups"),
    "simpo": LossKind(uses=frozenset({"beta", "simpo_gamma"}), needs_reference=False, per_token=True),
    "orpo": LossKind(needs_reference=False, per_token=True),
    "sft": LossKind(uses=frozenset(), needs_reference=False, per_token=True, takes_labels=True),
    "bco_pair": LossKind(running=True, takes_labels=True),
    "kto": LossKind(
        uses=frozenset({"beta", "desirable_weight", "undesirable_weight"}),
        whole_step=True,
        takes_labels=True,
        mismatched=True,
    ),
    "qrpo": LossKind(takes_labels=True, quantiles=True),
}
"""Name -> what it needs."""

NEEDS_SMOOTHING = ("exo_pair", "robust")  # with 0, exo_pair is infinite and robust is sigmoid
ANY_LOSS = {"type", "weights", "sft_weight", "ld_alpha", "pair_weights"}
"""Options that may be combined with any loss."""
SHOWN_IF_SET = (ANY_LOSS | DIVERGENCE) - {"type", "weights"}
"""Options that a title leaves out where they have their default."""


def is_known(name: str) -> bool:
    """Whether this is a loss of the table, or names a function of the user's own."""
    return name in LOSSES or name.startswith(PREFIX)


def kind_of(name: str) -> LossKind:
    """What a loss needs; one of the user's own is over pairs, of summed log-probs, with a reference."""
    return LossKind(uses=SMOOTHED) if name.startswith(PREFIX) else LOSSES[name]


def names_of(loss: LossConfig) -> list[str]:
    """The losses of a configuration: one, or several that are added."""
    return [loss.type] if isinstance(loss.type, str) else list(loss.type)


def needs_reference(loss: LossConfig) -> bool:
    """Whether training and held-out rewards need reference log-probs."""
    return any(kind_of(name).needs_reference for name in names_of(loss))


def averaged_over_groups(loss: LossConfig) -> bool:
    """Whether the mean is over groups instead of pairs."""
    return any(kind_of(name).averaged_over == "groups" for name in names_of(loss))


def needs_whole_step(loss: LossConfig) -> bool:
    """Whether the loss of a pair depends on the other pairs of the optimizer step."""
    return any(is_known(name) and kind_of(name).whole_step for name in names_of(loss))


def needs_mismatched(loss: LossConfig) -> bool:
    """Whether the data must have completions of other prompts, whose reference log-probs are cached too."""
    return any(kind_of(name).mismatched for name in names_of(loss))


def needs_quantiles(loss: LossConfig) -> bool:
    """Whether the data must have scores, of samples of the reference too."""
    return any(kind_of(name).quantiles for name in names_of(loss))


def needs_aligned(loss: LossConfig) -> bool:
    """Whether the policy's log-probs are also needed aligned to its samples."""
    return loss.pair_weights == "wpo"


def takes_labels(loss: LossConfig) -> bool:
    """Whether completions with a label and no rival will do."""
    return all(kind_of(name).takes_labels for name in names_of(loss))


def compares_pairs(loss: LossConfig) -> bool:
    """Whether the loss of a pair depends on others, of its step or of steps before."""
    return any(kind_of(name).whole_step or kind_of(name).running for name in names_of(loss))


def has_running_sums(loss: LossConfig) -> bool:
    """Whether the loss depends on sums over the steps before."""
    return any(is_known(name) and kind_of(name).running for name in names_of(loss))


def title_of(loss: LossConfig) -> str:
    """The loss and every option that it uses, to be shown in reports."""
    names = names_of(loss)
    weights = loss.weights or [1.0] * len(names)
    mixed = " + ".join(f"{weight:g} {name}" for weight, name in zip(weights, names, strict=True))
    used = set().union(*(kind_of(name).uses for name in names))
    shown = [f"{name.replace('_', ' ')} {getattr(loss, name):g}" for name in sorted(used - SHOWN_IF_SET)]
    plain = LossConfig()
    shown += [
        f"{name.replace('_', ' ')} {getattr(loss, name)}"
        for name in sorted(SHOWN_IF_SET)
        if getattr(loss, name) != getattr(plain, name)
    ]
    return ", ".join([names[0] if len(names) == 1 else mixed, *shown])


def loss_problems(loss: LossConfig) -> Iterator[str]:
    """Everything wrong with the values but their ranges, each as `key: value; expected what`."""
    names = names_of(loss)
    unknown = [name for name in names if not is_known(name)]
    for name in unknown:
        hint = meant("loss.type", name, LOSSES)
        yield f"loss.type: {name}; expected one of {', '.join(LOSSES)}, or a list of them{hint}"
    for name in names:
        if name.startswith(PREFIX):
            try:
                find_function(name.removeprefix(PREFIX), "loss.type")
            except UserError as error:
                yield str(error)
    if not names:
        yield "loss.type: an empty list; expected at least one loss"
    if len({*names}) < len(names):
        yield f"loss.type: {names}; expected each loss once"
    if loss.weights is not None and len(loss.weights) != len(names):
        yield f"loss.weights: {len(loss.weights)} weights for {len(names)} losses; expected one for each"
    if not unknown and names:
        yield from _problems_of_use(loss, names)


def _problems_of_use(loss: LossConfig, names: list[str]) -> Iterator[str]:
    """Options that no loss of the configuration reads, and combinations without a meaning."""
    plain, losses = LossConfig(), ", ".join(names)
    used = ANY_LOSS.union(*(kind_of(name).uses for name in names))
    for option in (field.name for field in fields(loss)):
        if option not in used and getattr(loss, option) != getattr(plain, option):
            yield f"loss.{option}: {getattr(loss, option)}; {losses} does not use it: leave it out"
    if loss.label_smoothing == 0:
        for name in names:
            if name in NEEDS_SMOOTHING:
                yield f"loss.label_smoothing: 0; {name} needs a number above 0, such as 0.001"
    if loss.f_divergence != "alpha" and loss.f_alpha != plain.f_alpha and "f_alpha" in used:
        yield f"loss.f_alpha: {loss.f_alpha}; f_divergence {loss.f_divergence} has no alpha: leave it out"
    if "sft" in names and loss.sft_weight:
        yield f"loss.sft_weight: {loss.sft_weight}; sft is this term: give its weight in loss.weights"
    if loss.ld_alpha is not None:
        for name in names:
            if kind_of(name).per_token:
                yield f"loss.ld_alpha: {loss.ld_alpha}; {name} divides by the length already: leave it out"
        if needs_aligned(loss):
            yield f"loss.ld_alpha: {loss.ld_alpha}; pair_weights wpo takes whole completions: leave one out"
        if needs_mismatched(loss):
            yield f"loss.ld_alpha: {loss.ld_alpha}; kto takes whole completions: leave it out"
    if needs_whole_step(loss) and loss.pair_weights != "equal":
        yield f"loss.pair_weights: {loss.pair_weights}; {losses} compares the whole step: leave it out"
    elif needs_aligned(loss) and compares_pairs(loss):
        yield f"loss.pair_weights: wpo; {losses} compares pairs with those of other steps: leave it out"
    if needs_quantiles(loss) and compares_pairs(loss):
        yield f"loss.type: {names}; qrpo does not mix with losses that compare pairs with others"
    if averaged_over_groups(loss):
        if len(names) > 1:
            yield f"loss.type: {names}; a loss over rankings does not mix with losses over pairs"
        if loss.pair_weights != "equal":
            yield f"loss.pair_weights: {loss.pair_weights}; {losses} is over rankings: leave it out"
        if loss.sft_weight:
            yield f"loss.sft_weight: {loss.sft_weight}; {losses} is over rankings: leave it out"
