"""Model cards: what a model is, from what, how it was trained, what was measured, and how to load it."""

import re
from pathlib import Path
from typing import Any

import yaml

from dpo.config import Config, DataSource, ModelConfig, SftConfig
from dpo.loss.catalog import needs_reference, title_of

MEASURES = {
    "eval/loss": "held-out loss, nats",
    "eval/rewards/accuracies": "held-out reward accuracy",
    "eval/rewards/margins": "held-out reward margin",
    "positive_share/reference": "share scored positive, reference",
    "positive_share/policy": "share scored positive, this model",
    "win_rate": "win rate over the reference by score",
    "kl/sequence": "KL from the reference, nats a sequence",
}


def policy_card(config: Config, results: dict[str, float]) -> str:
    """The card of a model that learned preferences.

    Args:
        config: The resolved configuration.
        results: Numbers as in metrics.jsonl or summary.json; those that `MEASURES` names are shown.
    """
    train = config.train
    reference = f", with reference {_code(config.reference.model or config.model.name_or_path)}"
    method = (
        "Direct Preference Optimization ([arXiv 2305.18290](https://arxiv.org/abs/2305.18290); the loss is "
        f"named below) from {_code(config.model.name_or_path)}"
        f"{reference if needs_reference(config.loss) else ''}, on {_names(config.data.train)}."
    )
    settings = {
        "loss": title_of(config.loss),
        "learning rate": f"{train.learning_rate}, {train.schedule}, {train.warmup_steps} warm-up steps",
        "optimizer": f"{train.optimizer}, gradient norm clipped to {train.max_grad_norm}",
        "pairs a step": str(train.pairs_per_step),
        "length": f"{train.num_epochs} epoch(s)" + (f", {train.max_steps} steps" if train.max_steps else ""),
        "compute type": config.model.dtype,
        "seed": str(train.seed),
    }
    use = (
        "To continue text as the preferences ask, within the kind of prompts that the data has. It has "
        "learned what its labels reward and nothing else: no safety, no facts, and whatever bias the labels "
        "have (the report says, for one, how far length was rewarded)."
    )
    tags = ["dpo", "preference-optimization"]
    datasets = [source for source in _sources(config.data.train) if _is_hub_name(source)]
    return _card(Path(config.run_dir).name, config.model, tags, datasets, method, settings, results, use)


def sft_card(config: SftConfig, results: dict[str, float]) -> str:
    """The card of a model that learned next tokens; see `policy_card`."""
    train = config.train
    start = _code(config.model.name_or_path) if config.model.name_or_path else "random weights"
    settings = {
        "learning rate": f"{train.learning_rate}, {train.schedule}, {train.warmup_steps} warm-up steps",
        "optimizer": f"{train.optimizer}, gradient norm clipped to {train.max_grad_norm}",
        "sequences a step": str(train.sequences_per_step),
        "length": f"{train.num_epochs} epoch(s)" + (f", {train.max_steps} steps" if train.max_steps else ""),
        "compute type": config.model.dtype,
        "seed": str(train.seed),
    }
    method = f"Next-token training from {start} on {_names(config.data.train)}."
    datasets = [source for source in _sources(config.data.train) if _is_hub_name(source)]
    use = "To continue text like that of its data, or as the start and reference of preference optimization."
    return _card(Path(config.run_dir).name, config.model, ["sft"], datasets, method, settings, results, use)


def _card(
    title: str,
    base: ModelConfig,
    tags: list[str],
    datasets: list[str],
    method: str,
    settings: dict[str, str],
    results: dict[str, float],
    use: str,
) -> str:
    lora, is_adapter = base.lora, base.lora is not None and base.lora.export == "adapter"
    if lora is not None:
        tags = [*tags, "lora"]
        settings = {**settings, "LoRA": f"rank {lora.rank}, alpha {lora.alpha:g}"}
        kept = "this is the adapter alone" if is_adapter else "it is in these weights"
        method += f" Trained was a LoRA adapter; {kept}."
    shown = {name: results[name] for name in MEASURES if name in results}
    metadata: dict[str, Any] = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": tags,
    }
    if _is_hub_name(base.name_or_path):
        metadata["base_model"] = base.name_or_path
    if datasets:
        metadata["datasets"] = datasets
    if shown:
        held_out = {
            "name": "held-out part of the training data",
            "type": datasets[0] if datasets else "local",
        }
        metrics = [
            {"type": name, "name": MEASURES[name], "value": round(value, 6)} for name, value in shown.items()
        ]
        metadata["model-index"] = [
            {
                "name": title,
                "results": [
                    {"task": {"type": "text-generation"}, "dataset": held_out, "metrics": metrics},
                ],
            }
        ]
    sections = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---",
        f"# {title}",
        method,
        "## Results\n\n| measure | value | 95 % interval |\n|---|---|---|\n" + _rows(shown, results)
        if shown
        else "",
        "## Training\n\n| setting | value |\n|---|---|\n"
        + "\n".join(f"| {name} | {value} |" for name, value in settings.items()),
        f"## Intended use\n\n{use}",
        "## How to load it\n\n" + _loading(is_adapter=is_adapter, base=base.name_or_path),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def _rows(shown: dict[str, float], results: dict[str, float]) -> str:
    lines = []
    for name, value in shown.items():
        low, high = results.get(f"{name}/low"), results.get(f"{name}/high")
        interval = "" if low is None or high is None else f"{low:.3f} to {high:.3f}"
        lines.append(f"| {MEASURES[name]} | {value:.3f} | {interval} |")
    return "\n".join(lines)


def _loading(*, is_adapter: bool, base: str) -> str:
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if is_adapter:
        lines = [
            "from peft import PeftModel",
            *lines,
            f'base = AutoModelForCausalLM.from_pretrained("{base}")',
            'model = PeftModel.from_pretrained(base, "path/to/this/folder")',
        ]
    else:
        lines.append('model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")')
    lines.append('tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")')
    return "```python\n" + "\n".join(lines) + "\n```"


def _code(name: str) -> str:
    return f"`{name}`"


def _sources(train: str | list[DataSource]) -> list[str]:
    return [train] if isinstance(train, str) else [source.path for source in train]


def _names(train: str | list[DataSource]) -> str:
    return ", ".join(map(_code, _sources(train)))


def _is_hub_name(name: str) -> bool:
    return bool(re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name)) and not Path(name).exists()
