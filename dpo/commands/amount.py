"""How much training a configuration is, said before the long part and at the end."""

from dpo import distributed, terminal
from dpo.config import ModelConfig, SftTrainConfig, TrainConfig
from dpo.data.dataset import TokenizedDataset
from dpo.data.plan import BatchPlan
from dpo.engine.schedule import warmup_steps
from dpo.report.content import Ran

FEW_STEPS = 20
"""With fewer optimizer steps than this a policy hardly moves at the learning rates that keep it whole."""
LARGEST_RATE = 0.1
"""Above this not even Muon trains."""


def preference_plan(data: TokenizedDataset, train: TrainConfig) -> BatchPlan:
    """All optimizer steps of `dpo train`."""
    return BatchPlan(
        data.pairs_per_group,
        seed=train.seed,
        num_epochs=train.num_epochs,
        pairs_per_step=train.pairs_per_step,
        max_steps=train.max_steps,
    )


def steps_of(num_steps: int, train: TrainConfig | SftTrainConfig) -> str:
    """`12 steps of at most 64 pairs`."""
    unit, size = _per_step(train)
    return f"{num_steps} {'step' if num_steps == 1 else 'steps'} of at most {size} {unit}"


def ran(
    num_steps: int,
    train: TrainConfig | SftTrainConfig,
    described: str,
    held_out: str = "",
    *,
    done: int | None = None,
) -> Ran:
    """What a training does.

    Args:
        num_steps: Of the whole run.
        train: What it is told.
        described: The training data, for people.
        held_out: The held-out data; empty without any.
        done: Steps of the model that is meant, for a snapshot.
    """
    done = num_steps if done is None else done
    return Ran(
        steps=done, warmup=min(done, warmup_steps(num_steps, train)), train=described, held_out=held_out
    )


def hardly_any(num_steps: int, train: TrainConfig | SftTrainConfig) -> str:
    """What to change where the data makes a handful of steps that nobody asked for; else nothing."""
    if num_steps >= FEW_STEPS or train.max_steps is not None:
        return ""
    unit, size = _per_step(train)
    return (
        f"hardly any training: {steps_of(num_steps, train)}, at learning rate {train.learning_rate:g}: lower "
        f"train.{unit}_per_step ({size}), or raise train.num_epochs ({train.num_epochs})"
    )


def unusual_rate(train: TrainConfig | SftTrainConfig) -> str:
    """A question where the learning rate is far above any that trains a language model; else nothing."""
    if train.learning_rate <= LARGEST_RATE:
        return ""
    return (
        f"train.learning_rate: {train.learning_rate:g} is far above what trains a language model (1e-7 to "
        f"1e-3): is an exponent missing, as in {train.learning_rate:g}e-7?"
    )


def warn_of_amount(num_steps: int, model: ModelConfig, train: TrainConfig | SftTrainConfig) -> None:
    """Says what a person may not have meant: hardly any training, or bfloat16 on a CPU."""
    for said in filter(None, (unusual_rate(train), hardly_any(num_steps, train))):
        terminal.warning(said)
    if model.dtype == "bfloat16" and distributed.device().type == "cpu":
        terminal.warning(
            "model.dtype: bfloat16 on a CPU rounds log-probs to 3 digits, and is slow on most: float32 is "
            "exact (--model.dtype float32; each has its own reference cache)"
        )


def _per_step(train: TrainConfig | SftTrainConfig) -> tuple[str, int]:
    if isinstance(train, TrainConfig):
        return "pairs", train.pairs_per_step
    return "sequences", train.sequences_per_step
