"""TRL's losses on log-probs that are given, by its own trainers' _compute_loss; run by benchmarks.losses.

The trainer is a stand-in that has what that method reads, and the model gives the log-probs as they are,
spread evenly over the tokens of each completion. Prints case -> mean loss as JSON.
"""

import json
import sys
from collections import defaultdict
from types import SimpleNamespace

import torch
from trl import DPOTrainer, KTOTrainer  # type: ignore[import-not-found]

given = json.load(open(sys.argv[1]))  # noqa: SIM115, PTH123
logps = {name: torch.tensor(values, dtype=torch.float64) for name, values in given["logps"].items()}
tokens = torch.tensor([*given["tokens"]["chosen"], *given["tokens"]["rejected"]])
width = int(tokens.max())
mask = (torch.arange(width) < tokens[:, None]).long()
summed = torch.cat([logps["chosen"], logps["rejected"]])
per_token = (summed / tokens)[:, None] * mask
aligned_to = torch.tensor(given["aligned_to"], dtype=torch.float64)[:, None] * mask


class Model:
    """Gives the log-probs."""

    training = True

    def __init__(self, dtype: torch.dtype) -> None:
        """The log-probs as this type."""
        self.log_probs = per_token.to(dtype)

    def __call__(self, **_: object) -> SimpleNamespace:
        """What a model's forward pass gives."""
        nothing = torch.zeros_like(self.log_probs)
        return SimpleNamespace(
            log_probs=self.log_probs,
            entropy=nothing,
            mean_logits=nothing,
            is_top1=torch.zeros_like(mask, dtype=torch.bool),
            log_sum_sq_probs=aligned_to.to(self.log_probs.dtype),
            loss=None,
        )


def same(values: torch.Tensor) -> torch.Tensor:
    """What one process gathers."""
    return values


found = {}
for name, options in given["cases"].items():
    alpha = options.get("f_divergence_type") == "alpha_divergence"
    dtype = torch.float32 if alpha else torch.float64  # TRL has the alpha divergence up to float32
    trainer = SimpleNamespace(
        **{
            "model": Model(dtype),
            "accelerator": SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same),
            "args": SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None),
            "loss_types": ["sigmoid"],
            "loss_weights": [1.0],
            "ld_alpha": None,
            "f_divergence_type": "reverse_kl",
            "f_alpha_divergence_coef": 0.5,
            "use_weighting": False,
            "precompute_ref_logps": True,
            "aux_loss_enabled": False,
            "_metrics": {"train": defaultdict(list)},
            "_total_train_tokens": 0,
            "_tp_size": 1,
            "calculate_KL": True,
            "_compute_kl_logps": lambda *_: logps["mismatched"],
            **options,
        }
    )
    with_prompt = torch.cat([torch.zeros_like(mask[:, :1]), mask], dim=1)
    inputs = {
        "input_ids": with_prompt,
        "attention_mask": with_prompt,
        "completion_mask": with_prompt,
        "ref_chosen_logps": logps["reference_chosen"].to(dtype),
        "ref_rejected_logps": logps["reference_rejected"].to(dtype),
    }
    if name == "kto":  # each completion with its label
        inputs["label"] = torch.arange(len(tokens)) < len(tokens) // 2
        inputs["ref_logps"] = torch.cat([inputs.pop("ref_chosen_logps"), inputs.pop("ref_rejected_logps")])
        inputs["ref_KL_logps"] = logps["reference_mismatched"]
    kind = KTOTrainer if name == "kto" else DPOTrainer
    found[name] = float(kind._compute_loss(trainer, trainer.model, inputs, False))
print(json.dumps(found))
