"""How the system scales: memory and traffic of a rank, measured on real ranks and modelled beyond; balance of
the work over ranks, from the real plan on real lengths.

    python -m benchmarks.scaling --data hh-harmless/test.jsonl.gz --tokenizer tokenizers/gpt2

Writes scaling.md (tables), scaling.json and figures. Minutes on 2 cores.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, PreTrainedConfig

from benchmarks.rank_memory import Planned, some_trees
from dpo.config import DataConfig, ModelConfig
from dpo.data.build import open_datasets
from dpo.data.dataset import TokenizedDataset
from dpo.data.plan import plan_steps, share
from dpo.data.trees import Tree
from dpo.model.authors import remove_noise
from dpo.model.load import empty_model
from dpo.planning.memory import Name, rank_memory, shape_of
from dpo.planning.rehearsal import rehearse

ROOT = Path(__file__).parents[1]
STAGES: dict[Name, tuple[str, int]] = {
    "ZeRO-0": ("ds_zero2.json", 0),
    "ZeRO-2": ("ds_zero2.json", 2),
    "ZeRO-3": ("ds_zero3.json", 3),
}
MEASURED_RANKS = (1, 2, 4)
TREES = 4
MODELLED_RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
MODELLED: dict[str, PreTrainedConfig] = {
    "Llama 3.1 8B": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8,
        num_hidden_layers=32, vocab_size=128256,
    ),
    "Llama 3.1 70B": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8,
        num_hidden_layers=80, vocab_size=128256,
    ),
}  # fmt: skip
SHARDINGS: tuple[Name, ...] = ("ZeRO-2", "ZeRO-3", "ZeRO-3 offload")
BUDGET = 16384
BALANCED_RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
PAIRS_PER_STEP = (64, 256, 1024, 2048)
STEPS = 20
Row = dict[str, Any]


def main() -> None:
    """Measures, models, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", required=True, help="preference data, for its lengths")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/scaling"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    found = {
        "measured": [*measured()],
        "modelled": [*modelled()],
        "balance": [*balance(args.data, args.tokenizer)],
    }
    (args.output / "scaling.json").write_text(json.dumps(found, indent=1))
    page = "\n".join([*_measured_table(found["measured"]), *_balance_table(found["balance"])])
    (args.output / "scaling.md").write_text(page + "\n")
    draw_memory(found["measured"], found["modelled"], args.output / "scaling_memory.png")
    draw_balance(found["balance"], args.output / "scaling_balance.png")
    print(page)


def measured() -> Iterator[Row]:
    """Real ranks, GPT-2 of 26M parameters: peak bytes and bytes handed to collectives, and what was
    expected.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = GPT2Config(n_layer=8, n_embd=512, n_head=8, vocab_size=2000, n_positions=128)
        GPT2LMHeadModel(model).save_pretrained(folder / "model")
        for dtype in ("float32", "bfloat16"):
            config = ModelConfig(name_or_path=str(folder / "model"), dtype=dtype)
            planned = Planned.of(config, some_trees(TREES))
            for ranks in MEASURED_RANKS:
                for sharding in STAGES:
                    if sharding == "ZeRO-0" and dtype == "bfloat16":
                        continue  # DeepSpeed does not offer it
                    print(f"{ranks} rank(s), {sharding}, {dtype}", file=sys.stderr, flush=True)
                    real = _on_ranks(folder, config, sharding, ranks)
                    expected = planned.memory(sharding, ranks)
                    messages = planned.messages(sharding, ranks)
                    yield {
                        "ranks": ranks, "sharding": sharding, "dtype": dtype, "peak": real["peak"],
                        "expected_peak": expected["total"], "sent": sum(real["sent"].values()),
                        "expected_sent": sum(messages.values()), "parameters": expected["parameters"],
                    }  # fmt: skip


def _on_ranks(folder: Path, config: ModelConfig, sharding: Name, ranks: int) -> Row:
    name, stage = STAGES[sharding]
    settings = json.loads((ROOT / "configs" / name).read_text())
    settings["zero_optimization"]["stage"] = stage
    (folder / "ds.json").write_text(json.dumps(settings))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
        "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(folder / "ds.json"),
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": str(stage == 3).lower(),
    }  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.rank_memory", "--models", config.name_or_path]
    command += ["--dtype", config.dtype, "--trees", str(TREES), "--output", str(folder / "measured.json")]
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for rank in range(ranks)
    ]
    if any(process.wait() for process in processes):
        raise RuntimeError(f"{sharding} on {ranks} rank(s) failed")
    return dict(json.loads((folder / "measured.json").read_text())[config.name_or_path])


def modelled() -> Iterator[Row]:
    """Bytes of a rank of models that nobody measures on a laptop: bfloat16, AdamW, recomputed activations."""
    trees: list[Tree] = [(np.zeros(256, dtype=np.int32), [np.zeros(128, dtype=np.int32)] * 2)]
    model = ModelConfig(name_or_path="", gradient_checkpointing=True)
    for name, config in MODELLED.items():
        remove_noise(config)
        with torch.device("meta"):
            shape = shape_of(empty_model(config, model, dtype=torch.bfloat16))
        step = rehearse(config, model, trees * (BUDGET // 512), dtype=torch.bfloat16, gpu=True)
        for sharding in SHARDINGS:
            for ranks in MODELLED_RANKS:
                memory = rank_memory(
                    sharding, shape, step, world_size=ranks, dtype=torch.bfloat16, state_bytes=8
                )
                yield {
                    "model": name,
                    "sharding": sharding,
                    "ranks": ranks,
                    "total": memory.total,
                    "host": memory.host,
                }


def balance(path: str, tokenizer_name: str) -> Iterator[Row]:
    """The real plan on real lengths: how much more work the fullest rank has than the mean, and what of
    FlexAttention's rows is padding.
    """
    with tempfile.TemporaryDirectory() as folder:
        data = DataConfig(train=path, max_length=512, cache_dir=folder)
        dataset, _ = open_datasets(data, AutoTokenizer.from_pretrained(tokenizer_name), None)
        for pairs in PAIRS_PER_STEP:
            groups = _steps(dataset, pairs)
            for ranks in BALANCED_RANKS:
                yield {"pairs_per_step": pairs, "ranks": ranks, **_balance(dataset, groups, ranks)}


def _steps(dataset: TokenizedDataset, pairs: int) -> list[np.ndarray[Any, Any]]:
    """Groups of full steps, over as many epochs as it takes."""
    steps: list[np.ndarray[Any, Any]] = []
    epoch = 0
    while len(steps) < STEPS:
        plan = plan_steps(dataset.pairs_per_group, seed=0, epoch=epoch, pairs_per_step=pairs)
        cuts = zip(plan.offsets[:-2], plan.offsets[1:-1], strict=True)  # the last of an epoch is shorter
        steps += [plan.order[start:end] for start, end in cuts] or [plan.order]
        epoch += 1
    return steps[:STEPS]


def _balance(
    dataset: TokenizedDataset, steps: Sequence[np.ndarray[Any, Any]], ranks: int
) -> dict[str, float]:
    excess, padded, real = [], 0, 0
    for groups in steps:
        sizes = dataset.sizes(groups, "flex")
        shares = share(sizes, world_size=ranks, budget=BUDGET)
        loads = [int(sizes.work[np.concatenate(own).astype(int)].sum()) for own in shares]
        excess.append(max(loads) / (sum(loads) / ranks) - 1)
        rows = [int(sizes.work[batch].sum()) for own in shares for batch in own if batch]
        real += sum(rows)
        padded += sum(-(-row // 128) * 128 for row in rows)
    return {"excess": float(np.mean(excess)), "padding": 1 - real / padded}


def _measured_table(rows: Sequence[Row]) -> Iterator[str]:
    yield (
        "| ranks | sharding | type | peak, B a parameter | expected / measured | "
        "messages of a step, B a parameter | expected / measured |"
    )
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        size = row["parameters"]
        ratio = f"{row['expected_sent'] / row['sent']:.3f}" if row["expected_sent"] else ""
        yield (
            f"| {row['ranks']} | {row['sharding']} | {row['dtype']} | {row['peak'] / size:.2f} | "
            f"{row['expected_peak'] / row['peak']:.3f} | {row['sent'] / size:.2f} | {ratio} |"
        )


def _balance_table(rows: Sequence[Row]) -> Iterator[str]:
    yield ""
    yield "| ranks | " + " | ".join(f"{pairs} pairs a step" for pairs in PAIRS_PER_STEP) + " |"
    yield "|---" * (len(PAIRS_PER_STEP) + 1) + "|"
    for ranks in BALANCED_RANKS:
        found = {row["pairs_per_step"]: row for row in rows if row["ranks"] == ranks}
        cells = [f"{found[p]['excess']:.1%}, {found[p]['padding']:.1%}" for p in PAIRS_PER_STEP]
        yield f"| {ranks} | " + " | ".join(cells) + " |"


def draw_memory(real: Sequence[Row], beyond: Sequence[Row], path: Path) -> None:
    """Left the measured ranks, right the modelled ones."""
    plt = _pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    colours = {"ZeRO-0": "#666666", "ZeRO-2": "#1f77b4", "ZeRO-3": "#d95f02", "ZeRO-3 offload": "#1b9e77"}
    for sharding in STAGES:
        rows = [row for row in real if row["sharding"] == sharding and row["dtype"] == "float32"]
        ranks = [row["ranks"] for row in rows]
        left.plot(
            ranks, [row["expected_peak"] / 1e6 for row in rows], color=colours[sharding], label=sharding
        )
        left.plot(ranks, [row["peak"] / 1e6 for row in rows], "o", color=colours[sharding])
    left.set_xscale("log", base=2)
    left.set_xticks(MEASURED_RANKS, [str(n) for n in MEASURED_RANKS])
    left.set(xlabel="ranks", ylabel="MB a rank", title="GPT-2 26M, float32: points measured, lines modelled")
    left.set_ylim(bottom=0)
    left.legend(frameon=False)
    for name, style in zip(MODELLED, ("--", "-"), strict=True):
        for sharding in SHARDINGS:
            rows = [row for row in beyond if row["model"] == name and row["sharding"] == sharding]
            right.plot(
                [row["ranks"] for row in rows],
                [row["total"] / 1e9 for row in rows],
                style,
                color=colours[sharding],
                label=f"{name}, {sharding}",
            )
    right.axhline(72, color="black", linewidth=0.8)
    right.text(1024, 75, "90 % of 80 GB", ha="right", fontsize=8)
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.set_xticks(MODELLED_RANKS, [str(n) for n in MODELLED_RANKS])
    right.set(xlabel="GPUs", ylabel="GB a GPU", title=f"modelled: bfloat16, {BUDGET:,} tokens, recomputed")
    right.set_ylim(8, 1500)
    right.set_yticks([10, 20, 50, 100, 200, 500], ["10", "20", "50", "100", "200", "500"])
    right.legend(frameon=False, fontsize=8, loc="upper right", ncols=2)
    figure.savefig(path, dpi=110)


def draw_balance(rows: Sequence[Row], path: Path) -> None:
    """Excess of the fullest rank against the number of ranks."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(6.5, 4), constrained_layout=True)
    for pairs in PAIRS_PER_STEP:
        found = [row for row in rows if row["pairs_per_step"] == pairs and row["ranks"] > 1]
        axis.plot(
            [row["ranks"] for row in found],
            [100 * row["excess"] for row in found],
            "o-",
            markersize=3,
            label=f"{pairs} pairs a step",
        )
    axis.set_xscale("log", base=2)
    axis.set_yscale("symlog", linthresh=1)
    axis.set_ylim(bottom=0)
    axis.set_xticks(BALANCED_RANKS[1:], [str(n) for n in BALANCED_RANKS[1:]])
    axis.set_yticks([0, 1, 10, 100, 1000], ["0", "1 %", "10 %", "100 %", "1000 %"])
    axis.set(xlabel="ranks", ylabel="work of the fullest rank over the mean", title="HH, longest group first")
    axis.legend(frameon=False)
    figure.savefig(path, dpi=110)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


if __name__ == "__main__":
    main()
