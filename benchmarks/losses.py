"""The figure in docs/losses.md, and a comparison of our losses with TRL's on random log-probs.

    python -m benchmarks.losses --figure docs/figures/losses.png
    python -m benchmarks.losses --peer .venv-peers/bin/python      # after make bench-peers

The second runs TRL's own trainer code in its environment (benchmarks/peers/trl_losses.py) on random log-probs
from here, and prints the difference for each loss that both have.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from dpo.config import LossConfig
from dpo.loss.catalog import LOSSES
from dpo.loss.pairs import PairLogProbs
from dpo.loss.preference_loss import preference_loss
from dpo.report.figures import PALETTE, save_png

BETA, SMOOTHING = 0.5, 0.1
SMOOTHED_BY_PEERS = ("robust", "exo_pair", "aot", "aot_unpaired")
"""Types for which TRL uses label_smoothing too."""
ALPHA = 0.3
SIDES = ("chosen", "rejected", "mismatched")
SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{
        name: ({"type": name}, {"loss_types": [{"ipo_norm": "ipo"}.get(name, name)]})
        for name, kind in LOSSES.items()
        if kind.needs_reference and name not in ("plackett_luce", "ipo", "kto", "qrpo")
    },
    "forward KL": ({"f_divergence": "forward_kl"}, {"f_divergence_type": "forward_kl"}),
    "JS": ({"f_divergence": "js"}, {"f_divergence_type": "js_divergence"}),
    "alpha": (
        {"f_divergence": "alpha", "f_alpha": ALPHA},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1 - ALPHA},
    ),
    "hinge, JS": (
        {"type": "hinge", "f_divergence": "js"},
        {"loss_types": ["hinge"], "f_divergence_type": "js_divergence"},
    ),
    "wpo": ({"pair_weights": "wpo"}, {"use_weighting": True}),
    "kto": (
        {"type": "kto", "desirable_weight": 1.2, "undesirable_weight": 0.8},
        {"loss_type": "kto", "desirable_weight": 1.2, "undesirable_weight": 0.8},
    ),
}
"""What is compared -> our options and those of TRL's DPOTrainer, or KTOTrainer, that mean the same."""


def options(name: str, *, smoothed: bool = True) -> LossConfig:
    """The loss with the options of the figure."""
    given: dict[str, Any] = {"type": name, "beta": BETA}
    if smoothed and "label_smoothing" in LOSSES[name].uses:
        given["label_smoothing"] = SMOOTHING
    return LossConfig(**given)


def along(name: str, margins: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and its derivative by the margin, half of which comes from each completion.

    Completions have ten tokens; for losses without a reference, the log-probs differ by the margin.

    Args:
        name: Of the loss.
        margins: (B,) margins in nats.

    Returns:
        (B,) losses and (B,) derivatives.
    """
    margins = margins.clone().requires_grad_()
    tokens = torch.full_like(margins, 10, dtype=torch.int64)

    def pairs(chosen: Tensor, rejected: Tensor) -> PairLogProbs:  # with a KL of 0, for kto
        return PairLogProbs(
            chosen=chosen,
            rejected=rejected,
            chosen_tokens=tokens,
            rejected_tokens=tokens,
            chosen_sequences=torch.arange(len(margins)),
            mismatched=torch.zeros(1),
        )

    base = torch.full_like(margins, -20.0)
    policy = pairs(base + margins / 2, base - margins / 2)
    losses = preference_loss(policy, pairs(base, base), options(name), so_far={}).losses
    (gradient,) = torch.autograd.grad(losses.sum(), margins)
    return losses.detach(), gradient


def draw() -> Figure:
    """Each loss and its gradient against the margin, in four panels."""
    panels = [
        ("Logistic and similar", ["sigmoid", "robust", "exo_pair", "sigmoid_norm", "discopop"]),
        ("Targets and hinges", ["ipo", "ipo_norm", "sppo_hard", "hinge"]),
        ("Each completion separately", ["nca_pair", "apo_zero", "apo_down", "bco_pair", "kto"]),
        ("Rankings, and no reference", ["plackett_luce", "simpo", "orpo"]),
    ]
    margins = torch.linspace(-8, 8, 321, dtype=torch.float64)
    figure = Figure(figsize=(13, 6.4), layout="constrained")
    axes = figure.subplots(2, 4, sharex=True)
    for column, (title, names) in enumerate(panels):
        for index, name in enumerate(names):
            losses, gradient = along(name, margins)
            for row, values in enumerate((losses, gradient)):
                axes[row][column].plot(
                    margins.numpy(),
                    values.numpy(),
                    color=PALETTE[index],
                    linestyle=("-", "--", "-.", ":", (0, (5, 1)))[index],
                    label=name,
                )
        axes[0][column].set_title(title)
        axes[0][column].legend(frameon=False, fontsize=8)
        axes[1][column].set_xlabel("margin h, nats")
        for row in (0, 1):
            axes[row][column].grid(alpha=0.25)
            axes[row][column].axvline(0, color="black", linewidth=0.5)
    axes[0][0].set_ylabel("loss")
    axes[1][0].set_ylabel("gradient to the margin")
    figure.suptitle(
        f"Losses at beta {BETA}, label smoothing {SMOOTHING} where it is used, 10 tokens per completion"
    )
    return figure


def compare(peer: str) -> None:
    """Prints the difference to TRL for each of `SAME`; exits with status 1 if one is above 1e-6."""
    generator = torch.Generator().manual_seed(0)
    drawn = {
        name: (-30 * torch.rand(64, dtype=torch.float64, generator=generator) - 1).tolist()
        for name in (*SIDES, *(f"reference_{side}" for side in SIDES))
    }
    drawn["reference_mismatched"] = [logp - 2 for logp in drawn["reference_mismatched"]]  # a KL above 0
    tokens = {
        name: torch.randint(1, 30, (64,), generator=generator).tolist() for name in ("chosen", "rejected")
    }
    aligned_to = (-3 * torch.rand(128, dtype=torch.float64, generator=generator)).tolist()  # per token
    cases = {
        name: {"beta": BETA, "label_smoothing": SMOOTHING, **theirs} for name, (_, theirs) in SAME.items()
    }
    given = {"logps": drawn, "tokens": tokens, "aligned_to": aligned_to, "cases": cases}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "given.json"
        file.write_text(json.dumps(given))
        script = str(Path(__file__).parent / "peers" / "trl_losses.py")
        found = subprocess.run([peer, script, str(file)], stdout=subprocess.PIPE, text=True, check=True)
    theirs = json.loads(found.stdout.splitlines()[-1])
    policy, reference = (
        PairLogProbs(
            **{side: torch.tensor(drawn[f"{which}{side}"], dtype=torch.float64) for side in SIDES},
            chosen_tokens=torch.tensor(tokens["chosen"]),
            rejected_tokens=torch.tensor(tokens["rejected"]),
        )
        for which in ("", "reference_")
    )
    per_token = policy.chosen / policy.chosen_tokens + policy.rejected / policy.rejected_tokens
    aligned = per_token - torch.tensor(aligned_to, dtype=torch.float64).reshape(2, 64).sum(0)
    policy = replace(policy, aligned=aligned)
    worst = 0.0
    for name, (options_of_ours, _) in SAME.items():
        smoothing: dict[str, Any] = {"label_smoothing": SMOOTHING} if name in SMOOTHED_BY_PEERS else {}
        loss = LossConfig(beta=BETA, **smoothing, **options_of_ours)
        ours = preference_loss(policy, reference, loss, so_far={}).losses.mean().item()
        difference = abs(ours - theirs[name]) / max(1.0, abs(theirs[name]))
        worst = max(worst, difference)
        print(f"{name:<14} ours {ours:14.8f}   TRL {theirs[name]:14.8f}   difference {difference:.1e}")
    if worst > 1e-6:
        sys.exit(f"a loss differs by {worst:.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--peer", help="Python of an environment with TRL")
    arguments = parser.parse_args()
    if arguments.figure:
        save_png(draw(), arguments.figure)
    if arguments.peer:
        compare(arguments.peer)
