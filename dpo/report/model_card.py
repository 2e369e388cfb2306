"""Model cards, RUN_DIR/model/README.md: how a model was trained, what was measured, how to load it.

The front matter is what the hub reads. It names only models and data sets that are on the hub.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dpo.config import (
    DataConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    OptimizationConfig,
    ReferenceConfig,
    SftTrainConfig,
    TrainConfig,
    sources_of,
)
from dpo.loss.catalog import needs_reference, title_of
from dpo.report.content import Ran
from dpo.report.escape import markdown_cell
from dpo.report.labels import COUNTS, MEASURE_COLUMNS, full, measures
from dpo.report.markdown import table

SHOWN = (
    "eval/loss",
    "eval/rewards/accuracies",
    "eval/rewards/margins",
    "positive_share/reference",
    "positive_share/policy",
    "win_rate",
    "kl/sequence",
)
"""The metrics that a card shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Card:
    """What differs between the cards."""

    title: str
    base: ModelConfig
    """What training started from."""
    tags: list[str]
    datasets: list[str]
    """Hub names."""
    method: str
    settings: dict[str, str]
    use: str


def policy_card(
    results: dict[str, float],
    *,
    title: str,
    model: ModelConfig,
    data: DataConfig,
    reference: ReferenceConfig,
    loss: LossConfig,
    train: TrainConfig,
    ran: Ran,
) -> str:
    """The card of a model that learned preferences.

    Args:
        results: Metrics as in metrics.jsonl or summary.json; those in `SHOWN` are shown.
        title: Name of the model.
        model: What training started from.
        data: The preferences.
        reference: The reference model.
        loss: The loss.
        train: The training settings.
        ran: What was made of them.
    """
    start = _code(model.name_or_path)
    against = (
        f", with reference {_code(reference.model or model.name_or_path)}" if needs_reference(loss) else ""
    )
    if reference.update_every:
        against += (
            f", which the policy itself replaces every {reference.update_every} steps "
            "([TR-DPO](https://arxiv.org/abs/2404.09656))"
        )
    sources = _sources(data)
    return _written(
        _Card(
            title=title,
            base=model,
            tags=["dpo", "preference-optimization"],
            datasets=list(filter(_is_hub_name, sources)),
            method="Direct Preference Optimization ([arXiv 2305.18290](https://arxiv.org/abs/2305.18290); "
            f"the loss is given below) from {start}{against}, on {', '.join(map(_code, sources))}.",
            settings={
                "loss": title_of(loss),
                **_settings(model, train, ran, {"pairs per step": f"at most {train.pairs_per_step}"}),
            },
            use="Continuing text as the preferences ask, for prompts like those of the data. The model has "
            "learned what the labels reward and nothing else: neither safety nor facts. It has whatever bias "
            "the labels have; the report shows, for example, how far they reward length.",
        ),
        results,
    )


def sft_card(
    results: dict[str, float],
    *,
    title: str,
    model: ModelConfig,
    data: DataConfig,
    train: SftTrainConfig,
    ran: Ran,
) -> str:
    """The card of a model that learned next tokens; arguments as in `policy_card`."""
    start = _code(model.name_or_path) if model.name_or_path else "random weights"
    sources = _sources(data)
    return _written(
        _Card(
            title=title,
            base=model,
            tags=["sft"],
            datasets=list(filter(_is_hub_name, sources)),
            method=f"Next-token training from {start} on {', '.join(map(_code, sources))}.",
            settings=_settings(
                model, train, ran, {"sequences per step": f"at most {train.sequences_per_step}"}
            ),
            use="Continuing text like that of its data, or as the start and reference of preference "
            "optimization.",
        ),
        results,
    )


def _settings(
    model: ModelConfig, train: OptimizationConfig, ran: Ran, batch: dict[str, str]
) -> dict[str, str]:
    lora = model.lora
    least = f" to {train.min_learning_rate}" if train.min_learning_rate else ""
    return {
        "learning rate": f"{train.learning_rate}, {train.schedule}{least}, after {ran.warmup} warm-up steps",
        "optimizer": f"{train.optimizer}, gradient norm clipped to {train.max_grad_norm}",
        **batch,
        "length": f"{ran.steps} optimizer steps, {train.num_epochs} epoch(s) at most",
        "training data": ran.train,
        **({"held-out data": ran.held_out} if ran.held_out else {}),
        "compute type": f"{model.dtype}, base in {model.quantization}" if model.quantization else model.dtype,
        "seed": str(train.seed),
        **({"LoRA": _adapter_settings(lora)} if lora is not None else {}),
    }


def _adapter_settings(lora: LoraConfig) -> str:
    if lora.start == "continue":
        return "the adapter it started from was trained on"
    kinds = {"DoRA": lora.dora, "rank-stabilized": lora.rank_stabilized}
    named = [f"rank {lora.rank}", f"alpha {lora.alpha:g}", *(name for name, on in kinds.items() if on)]
    if lora.learning_rate_ratio != 1:
        named.append(f"learning rates in a ratio of {lora.learning_rate_ratio:g}")
    for name, places in (("experts", lora.target_parameters), ("whole modules", lora.modules_to_save)):
        named += [f"{name} {' '.join(places)}"] if places else []
    return ", ".join(named)


def _written(card: _Card, results: dict[str, float]) -> str:
    """The whole file: front matter, then sections."""
    method = card.method
    if card.base.lora is not None:
        kept = "this is the adapter alone" if _is_adapter(card.base) else "it is merged into these weights"
        method += f" A LoRA adapter was trained; {kept}."
    shown = {
        name: value
        for name, value in results.items()
        if name.removesuffix("/low").removesuffix("/high") in (*SHOWN, *COUNTS)
    }
    rows = [(markdown_cell(label), f"{value:.3f}", *rest) for label, value, *rest in measures(shown)]
    metadata = yaml.safe_dump(_metadata(card, results), sort_keys=False, allow_unicode=True)
    sections = [f"---\n{metadata}---", f"# {card.title}", method]
    if rows:
        sections.append("## Results\n\n" + table(MEASURE_COLUMNS, rows))
    sections += [
        "## Training\n\n" + table(("setting", "value"), card.settings.items()),
        f"## Intended use\n\n{card.use}",
        "## How to load it\n\n" + _loading(card.base),
    ]
    return "\n\n".join(sections) + "\n"


def _metadata(card: _Card, results: dict[str, float]) -> dict[str, Any]:
    """The front matter, with the keys of the hub."""
    shown = {name: results[name] for name in SHOWN if name in results}
    metadata: dict[str, Any] = {
        "library_name": "peft" if _is_adapter(card.base) else "transformers",
        "pipeline_tag": "text-generation",
        "tags": [*card.tags, "lora"] if card.base.lora is not None else card.tags,
    }
    if _is_hub_name(card.base.name_or_path):
        metadata["base_model"] = card.base.name_or_path
    if card.datasets:
        metadata["datasets"] = card.datasets
    if shown:
        held_out = {
            "name": "held-out part of the training data",
            "type": card.datasets[0] if card.datasets else "local",
        }
        metrics = [
            {"type": name, "name": full(name), "value": round(value, 6)} for name, value in shown.items()
        ]
        result = {"task": {"type": "text-generation"}, "dataset": held_out, "metrics": metrics}
        metadata["model-index"] = [{"name": card.title, "results": [result]}]
    return metadata


def _loading(base: ModelConfig) -> str:
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if _is_adapter(base):
        lines = [
            "from peft import AutoPeftModelForCausalLM",
            "from transformers import AutoTokenizer",
            "",
            'model = AutoPeftModelForCausalLM.from_pretrained("path/to/this/folder")',
        ]
    else:
        lines.append('model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")')
    lines.append('tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")')
    return "```python\n" + "\n".join(lines) + "\n```"


def _sources(data: DataConfig) -> list[str]:
    """Paths and hub names of the training data."""
    return [source.path for source in sources_of(data.train)]


def _is_adapter(base: ModelConfig) -> bool:
    """Whether the exported model is an adapter alone."""
    return base.lora is not None and base.lora.export == "adapter"


def _code(name: str) -> str:
    return f"`{name}`"


def _is_hub_name(name: str) -> bool:
    return bool(re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name)) and not Path(name).exists()
