"""Trains two steps with each loss on real ranks in one process group; test_losses.py compares the results."""

import json
import os
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpo import distributed
from dpo.config import Config, DataConfig, LossConfig, ModelConfig, ReferenceConfig, TrainConfig
from dpo.data.build import open_datasets
from dpo.data.plan import BatchPlan
from dpo.data.preference_data import preference_data
from dpo.engine.engine import Engine
from dpo.engine.world import start
from dpo.guards.guard import Guard
from dpo.loss.catalog import LOSSES, averaged_over_groups, needs_mismatched, needs_quantiles, needs_reference
from dpo.model.load import load_model
from dpo.model.probe_trees import trees_of
from dpo.model.tokenizer import load_tokenizer
from dpo.reference.precompute import precompute
from dpo.reference.store import reference_store
from dpo.reference.values import open_reference
from dpo.tracking.run_folder import RunFolder
from dpo.train import loop
from dpo.train.preference_objective import PreferenceObjective
from dpo.train.resume import Settings
from dpo.train.session import Session

STEPS = 2
BUDGETS = (48, 512)
CUT = 12
"""Smallest budget of cached gradients: every group is larger, and is cut into pieces."""
SWEEP: dict[str, dict[str, Any]] = {
    **{name: {"type": name} for name in LOSSES},
    "exo_pair": {"type": "exo_pair", "label_smoothing": 0.1},
    "robust": {"type": "robust", "label_smoothing": 0.1},
    "conservative": {"label_smoothing": 0.2},
    "mixture": {"type": ["sigmoid", "ipo", "simpo"], "weights": [1.0, 0.1, 0.5], "sft_weight": 0.3},
    "lengths": {"ld_alpha": 0.5},
    "lengths and likelihood": {"type": "ipo", "ld_alpha": 0.0, "sft_weight": 1.0},
    "by scores": {"pair_weights": "score_margin"},
    "labels, kto": {"type": "kto", "beta": 0.5, "undesirable_weight": 0.7},
    "labels, bco": {"type": ["bco_pair", "sft"], "beta": 0.5},
    "labels, apo": {"type": "apo_zero", "beta": 0.5},
    "MPO": {"type": ["sigmoid", "bco_pair", "sft"], "weights": [0.8, 0.2, 1.0]},
    "wpo": {"pair_weights": "wpo"},
    "cached wpo": {"type": "ipo", "pair_weights": "wpo"},
    "forward KL": {"f_divergence": "forward_kl"},
    "JS": {"f_divergence": "js"},
    "alpha": {"f_divergence": "alpha", "f_alpha": 0.3},
    "cached": {"type": "sigmoid", "beta": 0.3},
    "cached tokens": {"ld_alpha": 0.25},
    "cached group": {"type": "sigmoid", "beta": 0.4},
    "experts": {"type": "sigmoid", "beta": 0.2},
    "experts, cached": {"type": "sigmoid", "beta": 0.5},
}
AUX_LOSS_WEIGHT = 1.0
"""Of the balancing loss, in the entries with experts."""


def write_experts(folder: Path, model: Path) -> None:
    """A Mixtral with the tokenizer of `model`, for the entries with experts."""
    from benchmarks.tiny_models import tiny_config, tiny_model  # here: ranks do not need all families

    tokenizer = load_tokenizer(ModelConfig(name_or_path=str(model)))
    tiny_model("mixtral", tiny_config("mixtral", vocab_size=len(tokenizer))).save_pretrained(
        folder / "experts"
    )
    tokenizer.save_pretrained(folder / "experts")


def experiment(folder: Path, model: Path, *, labelled: bool) -> Config:
    """Groups of two to four completions: scored, which cover rankings, ties and weights, or labelled."""
    return Config(
        run_dir=str(folder / "run"),
        model=ModelConfig(name_or_path=str(model), dtype="float32"),
        data=DataConfig(
            train=str(folder / ("labelled.jsonl" if labelled else "scored.jsonl")),
            pairing="all",
            cache_dir=str(folder / "tokenized"),
        ),
        reference=ReferenceConfig(cache_dir=str(folder / "reference"), store_token_logps=True),
        train=TrainConfig(learning_rate=1e-3, warmup_steps=0, pairs_per_step=24),
    )


def write_scored(folder: Path) -> None:
    """The data of `experiment`."""
    rows = [
        {
            "prompt": f"{n} the cat " + "sat " * (n % 5),
            "completions": [
                f" {word} {n}" + " day" * ((n + k) % 4) for k, word in enumerate("abcd"[: 2 + n % 3])
            ],
            "scores": [0.5 * ((3 * n + 2 * k) % 5) for k in range(2 + n % 3)],
        }
        for n in range(24)
    ]
    (folder / "scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row in rows:
        row["labels"] = [score > 1 for score in row.pop("scores")]  # type: ignore[attr-defined]
    (folder / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def sweep(environment: Mapping[str, str], folder: Path, model: Path, out: Path) -> None:
    """One rank's work: fills the cache, trains with every loss and budget; rank 0 writes the metrics."""
    os.environ.update(environment)
    distributed.start()
    bases = {labelled: experiment(folder, model, labelled=labelled) for labelled in (False, True)}
    accelerator = start(bases[False].model)
    tokenizer = load_tokenizer(bases[False].model)
    datasets = {
        (labelled, mismatched): open_datasets(base.data, tokenizer, 64, mismatched=mismatched)[0]
        for labelled, base in bases.items()
        for mismatched in (False, True)
    }
    store = reference_store(bases[False].model, Path(bases[False].reference.cache_dir))
    precompute(bases[False].model, bases[False].reference, [*datasets.values()], store)
    routed = experiment(folder, folder / "experts", labelled=False)
    routed = replace(routed, model=replace(routed.model, router_aux_loss_weight=AUX_LOSS_WEIGHT))
    store_routed = reference_store(routed.model, Path(routed.reference.cache_dir))
    precompute(routed.model, routed.reference, [datasets[False, False]], store_routed)
    found: dict[str, list[dict[str, float]]] = {}
    for name, options in SWEEP.items():
        loss = LossConfig(**options)
        labelled = name.startswith("labels")
        with_experts = name.startswith("experts")
        base = routed if with_experts else bases[labelled]
        config, data = replace(base, loss=loss), datasets[labelled, needs_mismatched(loss)]
        again = precompute(config.model, config.reference, [data], store_routed if with_experts else store)
        assert again.misses == 0, f"{name}: the reference was computed again"
        needed, per_token = needs_reference(loss), loss.ld_alpha is not None
        reference = open_reference(
            config.model, config.reference, [data], needed=needed, per_token=per_token, command=""
        )
        objective = PreferenceObjective(
            data=preference_data(
                data,
                reference.values[0],
                by_margin=loss.pair_weights == "score_margin",
                over_groups=averaged_over_groups(loss),
                mismatched=needs_mismatched(loss),
                with_quantiles=needs_quantiles(loss),
            ),
            loss_config=loss,
            dtype="float32",
        )
        for budget in BUDGETS:
            backward, tokens = "auto", budget
            if "cached" in name:
                assert data.tree_tokens.min() > CUT
                backward, tokens = "cached", CUT if budget == BUDGETS[0] else budget
            train = replace(config.train, max_tokens_per_micro_batch=tokens, backward=backward)
            policy = Engine(accelerator, load_model(config.model), config.model, train)
            policy.settle_layout(trees_of((data[0].prompt, data[0].completions)))
            run_dir = folder / out.stem / f"{name}_{budget}"
            if distributed.is_main():
                run_dir.mkdir(parents=True)
            distributed.barrier()
            plan = BatchPlan(
                data.pairs_per_group,
                seed=2,
                num_epochs=1,
                pairs_per_step=6 if name == "cached group" else 24,
                max_steps=STEPS,
            )
            if name == "cached group":  # then a second rank has no work
                assert [len(plan.step(number + 1).groups) for number in range(STEPS)] == [1] * STEPS
            session = Session(
                folder=RunFolder(run_dir),
                settings=Settings({}),
                model=config.model,
                options=train,
                engine=policy,
                objective=objective,
                plan=plan,
                tokenizer=tokenizer,
                description="data",
                guard=Guard(RunFolder(run_dir), "train", 600),
            )
            with session.guard, session.opened(), closing(loop.batches_of(session)) as batches:
                found[f"{name}, {budget}"] = [
                    loop.train_step(session, batches, 1e-3)[0] for _ in range(STEPS)
                ]
    if distributed.is_main():
        out.write_text(json.dumps(found))
