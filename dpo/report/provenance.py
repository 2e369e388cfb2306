"""Where the numbers of a report come from: the models, data and settings, the versions, the commands.

Reads config.yaml and environment.json of the run folder, which training wrote.
"""

import json

from dpo import distributed
from dpo.config import EvaluateConfig, LossConfig, ModelConfig, ReferenceConfig, TrainConfig
from dpo.loss.catalog import title_of
from dpo.report.content import Provenance, Ran
from dpo.tracking.run_folder import RunFolder


def provenance_of(
    folder: RunFolder,
    ran: Ran | None,
    digests: dict[str, str],
    *,
    held_out: str,
    num_sampled: int,
    model: ModelConfig,
    reference: ReferenceConfig,
    loss: LossConfig,
    train: TrainConfig,
    evaluate: EvaluateConfig,
) -> Provenance:
    """The origin of a report; only the main process needs it.

    Args:
        folder: The run.
        ran: What the training did; None for a run of `sft`.
        digests: Digests of data and cache, by name.
        held_out: Pairs and prompts of the held-out data.
        num_sampled: Prompts that were continued.
        model: What training started from.
        reference: The reference model.
        loss: The loss that was trained.
        train: How it was trained.
        evaluate: How it was evaluated.
    """
    trained = {"training": "next-token prediction; loss and rewards are those of its use as a policy"}
    if ran is not None:
        trained = {
            "loss": title_of(loss),
            "training": f"{ran.steps} optimizer steps of at most {train.pairs_per_step} pairs, learning rate "
            f"{train.learning_rate} after {ran.warmup} warm-up steps, {train.optimizer}, seed {train.seed}",
            "training data": ran.train,
        }
    fewer = f" ({evaluate.num_prompts} were asked for)" if num_sampled < evaluate.num_prompts else ""
    essentials = {
        "policy": f"{folder.model(evaluate.snapshot)}, from {model.name_or_path}",
        "reference": reference.model or model.name_or_path,
        **trained,
        "held-out data": held_out,
        "samples": f"{num_sampled} prompts{fewer}, temperature {evaluate.temperature}, up to "
        f"{evaluate.completion_tokens} tokens, seed {evaluate.seed}, scorer {evaluate.scorer or 'none'}",
        **(
            {"judge": f"{evaluate.judge}, rubric {evaluate.judge_rubric or 'ours'}"} if evaluate.judge else {}
        ),
        "KL": "estimated from separate samples at temperature 1, without top-k or top-p",
        "intervals": "95 %: of shares Wilson's, of the rest bootstrapped; both by prompt, not by pair",
    }
    return Provenance(
        essentials=essentials, commands=_commands(folder), versions=digests | _environment(folder)
    )


def learned_preferences(folder: RunFolder) -> bool:
    """Whether `train` made the run, not `sft`; also true for a folder without a configuration."""
    settings = folder.settings()
    return settings is None or "loss" in settings


def _environment(folder: RunFolder) -> dict[str, str]:
    """What training wrote to environment.json, and the ranks of this evaluation."""
    found: dict[str, str] = {}
    if folder.environment.is_file():
        trained = json.loads(folder.environment.read_text())
        found["trained by"] = f"{trained['engine']}, {trained['world_size']} rank(s)"
        packages = trained["packages"].items()
        found["versions"] = ", ".join(
            [f"python {trained['python']}", *(f"{name} {version}" for name, version in packages)]
        )
        found["code"] = f"git commit {trained['git_commit'] or 'unknown'}"
    device = distributed.device().type
    return found | {"evaluated on": f"{distributed.world_size()} rank(s), {device}"}


def _commands(folder: RunFolder) -> list[str]:
    world = distributed.world_size()
    start = f"NPROC={world} launch/run" if world > 1 else "python -m dpo"
    return [f"{start} {name} --config {folder.config}" for name in ("precompute-ref", "train", "evaluate")]
