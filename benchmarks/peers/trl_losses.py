"""TRL's losses on log-probs that are given, by its own DPOTrainer._compute_loss; run by benchmarks.losses.

The trainer is a stand-in that has what that method reads, and the model gives the log-probs as they are,
spread evenly over the tokens of each completion. Prints type -> mean loss as JSON.
"""

import json
import sys
from collections import defaultdict
from types import SimpleNamespace

import torch
from trl import DPOTrainer  # type: ignore[import-not-found]

given = json.load(open(sys.argv[1]))  # noqa: SIM115, PTH123
logps = {name: torch.tensor(values, dtype=torch.float64) for name, values in given["logps"].items()}
tokens = torch.tensor([*given["tokens"]["chosen"], *given["tokens"]["rejected"]])
width = int(tokens.max())
mask = (torch.arange(width) < tokens[:, None]).long()
summed = torch.cat([logps["chosen"], logps["rejected"]])
per_token = (summed / tokens)[:, None] * mask
outputs = SimpleNamespace(
    log_probs=per_token,
    entropy=torch.zeros_like(per_token),
    mean_logits=torch.zeros_like(per_token),
    is_top1=torch.zeros_like(mask, dtype=torch.bool),
    loss=None,
)


class Model:
    """Gives the log-probs."""

    training = True

    def __call__(self, **_: object) -> SimpleNamespace:
        """What a model's forward pass gives."""
        return outputs


def same(values: torch.Tensor) -> torch.Tensor:
    """What one process gathers."""
    return values


found = {}
for name in given["types"]:
    trainer = SimpleNamespace(
        model=Model(),
        accelerator=SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same),
        args=SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None),
        beta=given["beta"],
        label_smoothing=given["label_smoothing"],
        loss_types=[name],
        loss_weights=[1.0],
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        use_weighting=False,
        precompute_ref_logps=True,
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    with_prompt = torch.cat([torch.zeros_like(mask[:, :1]), mask], dim=1)
    inputs = {
        "input_ids": with_prompt,
        "attention_mask": with_prompt,
        "completion_mask": with_prompt,
        "ref_chosen_logps": logps["reference_chosen"],
        "ref_rejected_logps": logps["reference_rejected"],
    }
    found[name] = float(DPOTrainer._compute_loss(trainer, trainer.model, inputs, False))
print(json.dumps(found))
