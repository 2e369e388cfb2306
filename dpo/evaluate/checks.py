"""What of the options can be known to be wrong before any weights are loaded."""

from dpo.config import EvaluateConfig
from dpo.errors import UserError
from dpo.evaluate.scoring import check_scorer


def check_best_of(options: EvaluateConfig) -> None:
    """Raises UserError, with all problems at once, if best-of has no scorer, a wrong one, or no prompts."""
    problems = [
        *(["evaluate.scorer: none; expected one, such as vader"] if options.scorer is None else []),
        *(["evaluate.num_prompts: 0; expected at least 1"] if options.num_prompts < 1 else []),
    ]
    if problems:
        raise UserError("\n".join(f"{problem}: best-of scores samples" for problem in problems))
    check_scorer(options)


def check_room(completion_tokens: int, positions: int | None) -> None:
    """Raises UserError if the longest continuation leaves no room for a prompt."""
    if positions is not None and completion_tokens >= positions:
        raise UserError(
            f"evaluate.completion_tokens: {completion_tokens}; the model has {positions} positions, and "
            "the prompt needs some: lower it"
        )
