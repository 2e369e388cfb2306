"""Every causal class of the installed transformers, trained by us and by the textbook: writes docs/models.md.

    python -m benchmarks.families WORK [--only FAMILY ...] [--seconds N] [--table docs/models.md]

Each family's tiny random model goes through check, precompute-ref, two steps of train, export and reload.
Beside it stand plain unpadded forward passes of transformers' own model and a textbook DPO step on them.
Results are kept in WORK, so that a run can be interrupted and continued.
"""

import argparse
import contextlib
import io
import json
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (the field's name for it)
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmarks.tiny_models import FAMILIES, tiny_model
from dpo.commands.check import check
from dpo.commands.inputs import open_data
from dpo.commands.precompute_ref import precompute_ref
from dpo.commands.train import build_session
from dpo.commands.training import run_training
from dpo.config import Config, DataConfig, ModelConfig, ReferenceConfig, TrainConfig
from dpo.data.dataset import TokenizedDataset
from dpo.data.records import TokenIds
from dpo.engine.scoring import make_scorer, settle_layout
from dpo.errors import UserError
from dpo.model.load import DTYPES, load_model
from dpo.model.probe_trees import probe_trees
from dpo.planning.fit import Machine
from dpo.planning.plan import make_plan
from dpo.reference.values import open_reference

STEPS, LEARNING_RATE, BETA, MAX_GRAD_NORM = 2, 1e-3, 0.1, 1.0
GPU = Machine(num_gpus=8, gpu_memory=80 * 2**30, gpu_flops=989e12, mfu=0.4)
WORDS = ("the", "cat", "sat", "on", "a", "mat", "while", "it", "rained", "and", "nobody", "came", "home")


HEAD = """# Model families

Tiny random models of the {classes} causal classes of transformers {version}, each through `check`,
`precompute-ref`, two steps of `train`, export and reload, beside plain unpadded passes of transformers'
own model and a textbook DPO step on them, in float32 on a CPU. Made by
`python -m benchmarks.families WORK --table docs/models.md`.

{exact} agree, {refused} are refused, {faults} fail; of {unmade} no tiny model could be made.

- layout: as the probe finds it ([how-it-works.md](how-it-works.md)), and in bfloat16 where that is another.
- reference: largest difference of a token's log-prob in the cache from the plain forward pass, in nats.
- gradient: relative difference of the first step's gradient norm from the textbook's.
- export: largest difference of a token's log-prob of the reloaded model from the one of the textbook,
  in nats. AdamW's first steps divide small gradients by themselves, so that their rounding grows.
- plan: whether `dpo plan` answers, or refuses in one line: the model's code looks at values.

| family | model | layout | reference | gradient | export | plan |
|---|---|---|---|---|---|---|"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What was found for a family."""

    family: str
    model: str = ""
    """Class of the model."""
    layout: str = ""
    """In float32, and in bfloat16 where it is another."""
    reference: float | None = None
    """Largest difference of a token's log-prob in the cache from the plain forward pass, in nats."""
    gradient: float | None = None
    """Relative difference of the first step's gradient norm from the textbook's."""
    export: float | None = None
    """Largest difference of a token's log-prob of the exported model from the textbook's, in nats."""
    plan: str = ""
    """Whether `dpo plan` answers."""
    refused: str = ""
    """The line with which the model is refused."""
    fault: str = ""
    """What went wrong: a traceback's last line."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with 300 entries, of which 0 is padding and 1 the end."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>", pad_token="<pad>")


def write_pairs(path: Path, num_prompts: int = 5) -> None:
    """Prompts with two or three completions, of which the longest is longer than every tiny window."""
    rng = np.random.default_rng(0)

    def text(longest: int) -> str:
        return " " + " ".join(rng.choice(WORDS, int(rng.integers(1, longest + 1))))

    with path.open("w") as file:
        for number in range(num_prompts):
            completions = [text(16) for _ in range(2 + number % 2)]
            pairs = [{"chosen": 0, "rejected": other} for other in range(1, len(completions))]
            row = {"prompt": text(9).strip(), "completions": completions, "pairs": pairs}
            file.write(json.dumps(row) + "\n")


def configuration(folder: Path, dtype: str = "float32") -> Config:
    """An experiment in a folder that holds model and pairs."""
    return Config(
        run_dir=str(folder / "run"),
        model=ModelConfig(name_or_path=str(folder / "model"), dtype=dtype),  # type: ignore[arg-type]
        data=DataConfig(train=str(folder / "pairs.jsonl"), cache_dir=str(folder / "tokenized")),
        reference=ReferenceConfig(cache_dir=str(folder / "reference"), store_token_logps=True),
        train=TrainConfig(
            learning_rate=LEARNING_RATE,
            warmup_steps=0,
            pairs_per_step=64,
            num_epochs=STEPS,
            max_grad_norm=MAX_GRAD_NORM,
        ),
    )


def compare(family: str, folder: Path) -> Row:
    """Trains the family's tiny model, and compares each stage with transformers' own model."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        model = tiny_model(family)
    except Exception as error:
        return Row(family=family, refused=f"transformers makes no such model of a config: {last_line(error)}")
    found: dict[str, Any] = {"family": family, "model": type(model).__name__}
    try:
        model.save_pretrained(folder / "model")
        make_tokenizer().save_pretrained(folder / "model")
        write_pairs(folder / "pairs.jsonl")
        with _quiet():
            for column, value in _compare(folder):
                found[column] = value
    except UserError as error:
        found["refused"] = first_sentence(str(error), folder)
    except Exception as error:
        found["fault"] = last_line(error)
    return Row(**found)


def _compare(folder: Path) -> Iterator[tuple[str, Any]]:
    """Name and value of a row's columns, as they are found."""
    config = configuration(folder)
    check("train", config, exact=False)
    data = open_data(config.data, config.model)[0]
    yield "layout", layouts(config, data)
    precompute_ref(config)
    cached = open_reference(config.model, config.reference, [data], needed=True, per_token=True, command="")
    plain = _plain(folder / "model")
    with torch.no_grad():
        expected = plain_logps(plain, data)
    yield "reference", largest(torch.from_numpy(np.asarray(cached.values[0])), expected)
    session = run_training("train", config, build_session)
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    ours = [line["train/grad_norm"] for line in map(json.loads, lines) if "train/grad_norm" in line]
    theirs = textbook_steps(plain, data, expected)
    yield "gradient", abs(ours[0] / theirs[0] - 1)  # the second follows AdamW's first step
    exported = _plain(session.folder.model())
    with torch.no_grad():
        yield "export", largest(plain_logps(exported, data), plain_logps(plain, data))
    yield "plan", planned(config)


def layouts(config: Config, data: TokenizedDataset) -> str:
    """The layout that is found in float32, and in bfloat16 if it is another."""
    found = []
    for dtype in ("float32", "bfloat16"):
        options = replace(config.model, dtype=dtype)
        scorer = make_scorer(load_model(options), options)
        probed = settle_layout(scorer, probe_trees([data]), DTYPES[dtype])
        found.append(probed.layout + (", one at a time" if probed.one_at_a_time else ""))
    return found[0] if found[0] == found[1] else f"{found[0]} ({found[1]} in bfloat16)"


def planned(config: Config) -> str:
    """What `dpo plan` says of the model at its size."""
    train = replace(config.train, max_tokens_per_micro_batch=512)  # recurrences in Python take their time
    try:
        make_plan(config.model, config.data, config.reference, train, GPU, exact=True)
    except UserError:
        return "refused"
    return "yes"


def _plain(folder: Path) -> nn.Module:
    """The model as transformers loads it, in evaluation mode."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model


def plain_logps(model: nn.Module, data: TokenizedDataset) -> Tensor:
    """(N,) log-probs of completion tokens: one sequence at a time, nothing padded, nothing shared."""
    return torch.cat([_sequence_logps(model, *data.sequence(number)) for number in range(len(data.keys))])


def _sequence_logps(model: nn.Module, prompt: TokenIds, completion: TokenIds) -> Tensor:
    ids = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64))[None]
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return -F.cross_entropy(logits.float(), ids[0, len(prompt) :], reduction="none")


def textbook_steps(model: nn.Module, data: TokenizedDataset, reference: Tensor) -> list[float]:
    """Optimizer steps of Eq. 7 of arXiv 2305.18290 on all pairs; returns the gradient norms.

    Args:
        model: Trained in place.
        data: All pairs make a step.
        reference: (N,) log-probs of the completion tokens.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    first = np.repeat(data.first_sequence, data.pairs_per_group)
    chosen, rejected = (torch.from_numpy(first + data.pairs[:, side]) for side in (0, 1))
    norms = []
    for _ in range(STEPS):
        ratios = sums(plain_logps(model, data) - reference, data)
        loss = -F.logsigmoid(BETA * (ratios[chosen] - ratios[rejected])).mean()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def sums(token_logps: Tensor, data: TokenizedDataset) -> Tensor:
    """(S,) sums over the completion of each sequence."""
    return torch.stack([part.sum() for part in token_logps.split(data.completion_tokens.tolist())])


def largest(found: Tensor, expected: Tensor) -> float:
    """Largest difference; infinite where one is not finite."""
    difference = float((found.double() - expected.double()).abs().max())
    return difference if np.isfinite(difference) else float("inf")


def last_line(error: Exception) -> str:
    """The type and the first line of an error's message."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:120]}"


def first_sentence(message: str, folder: Path) -> str:
    """The first line of a message, without the folder of this run."""
    line = message.splitlines()[0].replace(f"{folder}/", "").removeprefix("model.name_or_path: ")
    return line[:200]


@contextlib.contextmanager
def _quiet() -> Any:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def table(rows: Sequence[Row]) -> str:
    """docs/models.md."""
    exact = [row for row in rows if not row.refused and not row.fault]
    refused, faults = [row for row in rows if row.refused and row.model], [row for row in rows if row.fault]
    unmade = [row for row in rows if not row.model]
    lines = HEAD.format(
        classes=len(rows),
        version=transformers.__version__,
        exact=len(exact),
        refused=len(refused),
        faults=len(faults),
        unmade=len(unmade),
    ).splitlines()
    for row in exact:
        numbers = " | ".join(f"{value:.0e}" for value in (row.reference, row.gradient, row.export))
        lines.append(f"| {row.family} | {row.model} | {row.layout} | {numbers} | {row.plan} |")
    lines += ["", "## Refused", "", "| family | model | with this line |", "|---|---|---|"]
    lines += [f"| {row.family} | {row.model} | {row.refused} |" for row in refused]
    lines += ["", "## Not compared", "", "| family | why |", "|---|---|"]
    lines += [f"| {row.family} | {row.refused} |" for row in unmade]
    if faults:
        lines += ["", "## Faults", "", "| family | model | fault |", "|---|---|---|"]
        lines += [f"| {row.family} | {row.model} | {row.fault} |" for row in faults]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Compares the families that WORK has no line of yet, and writes the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.families")
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", nargs="*", default=[], help="families to compare again")
    parser.add_argument(
        "--seconds", type=float, default=1e9, help="stop after this long; the next call goes on"
    )
    parser.add_argument("--table", type=Path, help="write the table here")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    results, started = options.work / "families.json", time.monotonic()
    done: dict[str, Row] = {}
    if results.is_file():
        done = {name: Row(**row) for name, row in json.loads(results.read_text()).items()}
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    for family in options.only or [family for family in FAMILIES if family not in done]:
        if time.monotonic() - started > options.seconds:
            break
        done[family] = compare(family, options.work / family)
        shutil.rmtree(options.work / family, ignore_errors=True)
        results.write_text(json.dumps({name: asdict(row) for name, row in done.items()}, indent=1))
        print(
            {key: value for key, value in asdict(done[family]).items() if value not in ("", None)}, flush=True
        )
    if options.table is not None:
        options.table.write_text(table([done[family] for family in sorted(done)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
